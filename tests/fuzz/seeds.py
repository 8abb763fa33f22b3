"""Real files of every container, to be damaged: small networks, written by their own frameworks."""

import pathlib
from collections.abc import Callable

import safetensors.torch
import torch

from tests.support import keras_files, peers

_WIDTH = 0.1


def _network() -> torch.nn.Module:
    model = peers.torchvision().models.mobilenet_v2(width_mult=_WIDTH, num_classes=5)
    peers.randomize(model, seed=0)
    return model


def _torch_zip(folder: pathlib.Path) -> None:
    model = _network()
    torch.save(model.state_dict(), folder / "state.pth")
    torch.save(model, folder / "whole.pth")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, folder / "checkpoint.pth")


def _torch_legacy(folder: pathlib.Path) -> None:
    model, old = _network(), {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "state.pth", **old)
    torch.save(model, folder / "whole.pth", **old)


def _safetensors(folder: pathlib.Path) -> None:
    safetensors.torch.save_file(_network().state_dict(), folder / "model.safetensors")


def _keras_model() -> object:
    keras = peers.keras()
    model = keras.Sequential(
        [
            keras.layers.Rescaling(1 / 127.5, -1),
            keras_files.application(32),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, "softmax", name="mine"),
        ]
    )
    keras_files.randomize(model)
    return model


def _keras(folder: pathlib.Path) -> None:
    _keras_model().save(folder / "model.keras")


def _weights_h5(folder: pathlib.Path) -> None:
    _keras_model().save_weights(folder / "model.weights.h5")


def _h5(folder: pathlib.Path) -> None:
    _keras_model().save(folder / "keras_3.h5")
    keras_files.write_keras_2(_keras_model(), folder / "keras_2.h5")


def _tfjs(folder: pathlib.Path) -> None:
    keras_files.write_tfjs(_keras_model(), folder)


CONTAINERS: dict[str, Callable[[pathlib.Path], None]] = {
    "torch zip": _torch_zip,
    "torch legacy": _torch_legacy,
    "safetensors": _safetensors,
    "keras": _keras,
    "weights.h5": _weights_h5,
    "h5": _h5,
    "tfjs": _tfjs,
}


def write(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes files of one container, and returns their paths."""
    own = folder / name.replace(" ", "_")
    own.mkdir()
    CONTAINERS[name](own)
    return sorted(path for path in own.iterdir() if path.suffix != ".bin")
