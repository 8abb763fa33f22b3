"""Computes the golden files with the installed peers: python -m tests.golden.make (`make golden`).

Numbers go to NAME.npz, hashes to NAME.json, and the files in weights/ are as torch writes them.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.golden import inputs
from tests.support import optimizer_steps, peers, schedules, train_steps

Arrays = dict[str, np.ndarray]
Hashes = dict[str, str]


def network() -> Arrays:
    """torchvision's logits and mmpretrain's feature maps, in float64."""
    variables = inputs.variables(inputs.WIDTH, inputs.CLASSES)
    classifier = peers.torchvision().models.MobileNetV2(inputs.CLASSES, width_mult=inputs.WIDTH)
    backbone = peers.mmpretrain().models.MobileNetV2(
        widen_factor=inputs.WIDTH, out_indices=tuple(range(8))
    )
    for model in (classifier, backbone):
        model.double().eval()
        peers.assign(model, variables)
    x = peers.nchw(inputs.images())
    with torch.no_grad():
        found = {"logits": classifier(x).numpy()}
        maps = [peers.nhwc(each) for each in backbone(x)]
    return found | {f"map{index}": each for index, each in enumerate(maps)}


def keras() -> Arrays:
    """Keras's logits in float32, with its padding and epsilon."""
    images = inputs.images()
    model = peers.keras().applications.MobileNetV2(
        images.shape[1:],
        alpha=inputs.KERAS_WIDTH,
        weights=None,
        classes=inputs.CLASSES,
        classifier_activation=None,
    )
    variables = inputs.variables(inputs.KERAS_WIDTH, inputs.CLASSES)
    params, stats = variables["params"], variables["batch_stats"]
    layers = iter([layer for layer in model.layers if layer.weights])
    for name in peers.layer_names():
        here, there = params, stats
        for part in name.split("/"):
            here, there = here[part], there[part]
        kernel = here["conv"]["kernel"]
        conv, norm = next(layers), next(layers)
        # A depthwise kernel is (H, W, C, 1) in Keras.
        conv.set_weights([kernel.reshape(conv.weights[0].shape)])
        norm.set_weights([here["norm"]["scale"], here["norm"]["bias"], *there["norm"].values()])
    next(layers).set_weights([params["classifier"]["kernel"], params["classifier"]["bias"]])
    return {"logits": np.asarray(model(images.astype(np.float32)).detach())}


def training() -> Arrays:
    """mmpretrain's losses, and some of the variables after the last step, in float64."""
    from mmengine.model import BaseDataPreprocessor
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.structures import DataSample

    recipe = peers.recipe()
    recipe.model.backbone.widen_factor = train_steps.WIDTH
    recipe.model.head.update(num_classes=train_steps.CLASSES, topk=(1,))
    recipe.optim_wrapper.optimizer.lr = train_steps.RATE
    model = peers.mmpretrain().models.build_classifier(recipe.model)
    model.data_preprocessor = BaseDataPreprocessor()  # its own would round pixels to float32
    model.double().train()
    peers.assign(model, inputs.training_variables())
    wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
    mean, std = (np.array(recipe.data_preprocessor[name]) for name in ("mean", "std"))
    losses = []
    for batch in train_steps.batches(inputs.STEPS):
        pixels = peers.nchw((batch["image"].astype(np.float64) - mean) / std)
        samples = [DataSample().set_gt_label(int(label)) for label in batch["label"]]
        data = {"inputs": pixels, "data_samples": samples}
        losses.append(model.train_step(data, wrapper)["loss"].item())
    params, stats = peers.parameters(model), peers.statistics(model)
    return {
        "losses": np.array(losses),
        "stem": params["stem"]["conv"]["kernel"],
        "depthwise": params["layer4_1"]["depthwise"]["conv"]["kernel"],
        "bias": params["classifier"]["bias"],
        "variance": stats["layer7_0"]["project"]["norm"]["var"],
    }


def schedule() -> Arrays:
    """torch's and mmengine's learning rates: of each step, or of each of the page's 300 epochs."""
    from mmengine.registry import PARAM_SCHEDULERS
    from torch.optim import lr_scheduler

    def descent(rate: float) -> torch.optim.SGD:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], rate)

    def rates(sgd: torch.optim.SGD, scheduler: Any, count: int) -> np.ndarray:
        found = []
        for _ in range(count):
            found.append(sgd.param_groups[0]["lr"])
            sgd.step()
            scheduler.step()
        return np.array(found)

    recipe = peers.recipe()
    found: Arrays = {}
    sgd = descent(recipe.optim_wrapper.optimizer.lr)
    page = PARAM_SCHEDULERS.build(recipe.param_scheduler | {"optimizer": sgd})
    found["page"] = rates(sgd, page, recipe.train_cfg.max_epochs)
    steps, epochs = schedules.STEPS, schedules.EPOCHS
    sgd = descent(schedules.BASE)
    found["cosine"] = rates(sgd, lr_scheduler.CosineAnnealingLR(sgd, steps, 0.02), steps)
    sgd = descent(schedules.BASE)
    found["step"] = rates(sgd, lr_scheduler.MultiStepLR(sgd, [3, 5, 10], 0.2), epochs)
    sgd = descent(schedules.BASE)
    found["exponential"] = rates(sgd, lr_scheduler.ExponentialLR(sgd, 0.9), epochs)
    return found


def cross_entropy() -> Arrays:
    """torch's losses and gradients by the share of label smoothing, in float64."""
    values, labels = inputs.logits()
    found: Arrays = {}
    for smoothing in (0.0, 0.1, 1.0):
        leaf = torch.from_numpy(values).requires_grad_()
        losses = torch.nn.functional.cross_entropy(
            leaf, torch.from_numpy(labels), label_smoothing=smoothing, reduction="none"
        )
        (gradient,) = torch.autograd.grad(losses.mean(), leaf)
        found |= {f"losses {smoothing}": losses.detach().numpy()}
        found |= {f"gradient {smoothing}": gradient.numpy()}
    return found


def optimizer() -> Arrays:
    """torch's parameters after the last of some steps, in float64."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda params: torch.optim.SGD(params, momentum=0.9, weight_decay=0.04),
        "nesterov": lambda params: torch.optim.SGD(params, momentum=0.9, nesterov=True),
        "adamw": lambda params: torch.optim.AdamW(
            params, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3
        ),
    }
    found: Arrays = {}
    for name, make in makers.items():
        tensors = {
            path: torch.nn.Parameter(torch.from_numpy(value))
            for path, value in optimizer_steps.draw(0).items()
        }
        descent = make(list(tensors.values()))
        for rate, gradients in zip(optimizer_steps.RATES, optimizer_steps.gradients(), strict=True):
            descent.param_groups[0]["lr"] = rate
            for path, tensor in tensors.items():
                tensor.grad = torch.from_numpy(gradients[path])
            descent.step()
        found |= {f"{name} {path}": tensor.detach().numpy() for path, tensor in tensors.items()}
    return found


def transforms() -> Hashes:
    """Pixels of mmpretrain's evaluation crops, and of torchvision's crops of given boxes."""
    peers.mmpretrain()
    import mmcv.transforms
    from mmpretrain.datasets.transforms import ResizeEdge
    from torchvision.transforms import functional

    found = {}
    for size in inputs.CROP_SIZES:
        for interpolation in ("bilinear", "bicubic"):
            resize = ResizeEdge(101, backend="pillow", interpolation=interpolation)
            result = resize({"img": np.asarray(inputs.photo(*size))})
            crop = mmcv.transforms.CenterCrop(90)(result)["img"]
            found[f"{interpolation} {size[0]} x {size[1]}"] = inputs.sha256(crop)
    for left, top, width, height in inputs.BOXES:
        crop = functional.resized_crop(inputs.photo(500, 375), top, left, height, width, [96, 96])
        found[f"box {left} {top} {width} {height}"] = inputs.sha256(crop)
    return found


def operations() -> Hashes:
    """Pixels of each operation of torchvision's RandAugment, at several magnitudes."""
    peers.torchvision()
    from torchvision.transforms import autoaugment

    image = inputs.photo(*inputs.OPERATIONS_SIZE)
    space = autoaugment.RandAugment()._augmentation_space(inputs.BINS, image.size[::-1])

    def apply(name: str, magnitude: float) -> Any:
        how = autoaugment.InterpolationMode.NEAREST
        return autoaugment._apply_op(image, name, magnitude, how, None)

    found = {}
    for name, (magnitudes, signed) in space.items():
        arguments = [0.0]
        if magnitudes.ndim:
            bins = inputs.magnitude_bins(signed)
            arguments = [sign * magnitudes[index].item() for index, sign in bins]
        found[name] = inputs.sha256(*(apply(name, argument) for argument in arguments))
    return found


MAKERS: tuple[Callable[[], Arrays | Hashes], ...] = (
    network,
    keras,
    training,
    schedule,
    cross_entropy,
    optimizer,
    transforms,
    operations,
)


def write_weights() -> None:
    """Writes a small state dict in each of torch's serialisations, and its values beside them."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    peers.randomize(net, seed=0)
    state = net.state_dict()
    shared = torch.arange(12, dtype=torch.float64)
    tensors = state | {
        "float16": torch.ones(2).half() / 3,
        "bfloat16": torch.arange(6).bfloat16() / 7,
        "shared.rows": shared.reshape(3, 4)[1:],  # an offset into a storage
        "shared.columns": shared.reshape(3, 4).T,  # strides that are not C's
        "scalar": torch.tensor(7.5),
        "empty": torch.empty(0, 3),
    }
    folder = inputs.FOLDER / "weights"
    folder.mkdir(exist_ok=True)
    checkpoint = {"state_dict": OrderedDict(tensors), "meta": {"epoch": 3, "CLASSES": ("a", "b")}}
    for file, saved, options in (
        ("zip.pth", OrderedDict(tensors), {}),
        ("legacy.pth", OrderedDict(tensors), {"_use_new_zipfile_serialization": False}),
        ("checkpoint.pth", checkpoint, {}),
    ):
        torch.save(saved, folder / file, **options)
    values = {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }
    np.savez_compressed(folder / "values.npz", **values)


def main() -> None:
    """Writes all files."""
    for make in MAKERS:
        found = make()
        path = inputs.FOLDER / make.__name__
        if make in (transforms, operations):
            path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        else:
            np.savez_compressed(path.with_suffix(".npz"), **found)
    write_weights()


if __name__ == "__main__":
    main()
