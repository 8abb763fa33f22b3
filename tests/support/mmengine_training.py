"""Trains mmpretrain's classifier for four steps with its own runner: python -m ... FOLDER.

It is a separate program, because mmengine changes much global state. It writes to FOLDER:

  plain/epoch_{1,2}.pth      checkpoints as the runner writes them
  ema/epoch_{1,2}.pth        the same with its EMAHook
  {plain,ema}/raw.pth        the trained weights after the last step
  ema/averaged.pth           the hook's average after the last step
"""

import pathlib
import sys
from typing import Any

import torch

from tests.support import peers

CLASSES = ("cat", "dog", "eel")
MODEL: dict[str, Any] = {
    "type": "ImageClassifier",
    "backbone": {"type": "MobileNetV2", "widen_factor": 0.25},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": 1280, "topk": (1,)},
    "data_preprocessor": {  # mobilenet-v2_8xb32_in1k's
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "to_rgb": True,
    },
}


class Noise(torch.utils.data.Dataset):
    """Six images with labels, in the form of mmpretrain's pipelines."""

    metainfo = {"classes": CLASSES}  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        from mmpretrain.structures import DataSample

        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        return {"inputs": pixels, "data_samples": DataSample().set_gt_label(index % 3)}


def train(folder: pathlib.Path, ema: bool) -> None:
    """Trains for two epochs of two steps; a larger learning rate would make the network chaotic."""
    from mmengine.runner import Runner

    runner = Runner(
        model=MODEL,
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 3,
            "num_workers": 0,
            "dataset": Noise(),
            "sampler": {"type": "DefaultSampler", "shuffle": True},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.0001, "momentum": 0.9}},
        param_scheduler={"type": "StepLR", "by_epoch": True, "step_size": 1, "gamma": 0.98},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.3}] if ema else [],
        default_scope="mmpretrain",
        experiment_name=folder.name,
        randomness={"seed": 0},
        log_level="ERROR",
    )
    runner.train()
    torch.save(runner.model.state_dict(), folder / "raw.pth")
    if ema:
        (hook,) = (hook for hook in runner.hooks if hasattr(hook, "ema_model"))
        torch.save(hook.ema_model.module.state_dict(), folder / "averaged.pth")


if __name__ == "__main__":
    peers.mmpretrain()
    train(pathlib.Path(sys.argv[1]) / "plain", ema=False)
    train(pathlib.Path(sys.argv[1]) / "ema", ema=True)
