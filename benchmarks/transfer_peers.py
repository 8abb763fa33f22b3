"""Fine-tunes torchvision's MobileNetV2, for `benchmarks.transfer`; prints a line of JSON.

Two ways:

    tutorial  PyTorch's "Transfer Learning for Computer Vision Tutorial": every layer, SGD 0.001
              with momentum 0.9, a tenth of the rate after 7 of 25 epochs, batches of 4, random
              crops and flips. Its weights of the last epoch count, not those that were best on the
              photos that are tested here.
    timm      the defaults of timm's train.py: SGD with Nesterov momentum, 0.1 per 256 images,
              cosine, 5 epochs of warm-up (or a fifth of the epochs), batches of 128, weight decay
              2e-5, label smoothing 0.1, random crops of 8 % and more, flips, colour jitter 0.4.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import torch_peer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(weights: Path, classes: int) -> Any:
    """Returns torchvision's network with trained weights and a new classifier."""
    model = torch_peer.torchvision().models.mobilenet_v2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.classifier[1] = nn.Linear(model.last_channel, classes)
    return model.to(memory_format=torch.channels_last)


def train(
    model: Any,
    batches: Any,
    epochs: int,
    optimizer: Any,
    loss: Callable[..., Any],
    set_rate: Callable[[int], object],
) -> None:
    """Trains all layers; `set_rate` is called after each epoch with the number of those done."""
    model.train()
    for epoch in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            images = images.to(memory_format=torch.channels_last)
            loss(model(images), labels).backward()
            optimizer.step()
        set_rate(epoch + 1)


def tutorial(model: Any, data: Path, size: int, epochs: int) -> None:
    """Trains as PyTorch's tutorial does."""
    transforms = torch_peer.torchvision().transforms
    prepare = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    fall = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(epochs * 7 / 25)), gamma=0.1)
    batches = _loader(data / "train", prepare, 4, shuffle=True)
    train(model, batches, epochs, optimizer, nn.CrossEntropyLoss(), lambda _: fall.step())


def timm(model: Any, data: Path, size: int, epochs: int) -> None:
    """Trains with the defaults of timm's train.py."""
    import timm.data
    import timm.optim
    import timm.scheduler

    batch = 128
    prepare = timm.data.create_transform(
        size, is_training=True, color_jitter=0.4, interpolation="random", mean=MEAN, std=STD
    )
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="sgd", lr=0.1 * batch / 256, weight_decay=2e-5, momentum=0.9
    )
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=min(5, max(1, epochs // 5)),
        warmup_lr=1e-5,
        min_lr=0.0,
    )
    batches = _loader(data / "train", prepare, batch, shuffle=True)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    train(model, batches, epochs, optimizer, loss, scheduler.step)


def score(model: Any, data: Path, size: int) -> float:
    """Returns the top-1 accuracy on the split `val`, in percent."""
    transforms = torch_peer.torchvision().transforms
    prepare = transforms.Compose(
        [
            transforms.Resize(int(size / 0.875)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in _loader(data / "val", prepare, 64, shuffle=False):
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def _loader(folder: Path, prepare: Any, batch: int, shuffle: bool) -> Any:
    dataset = torch_peer.torchvision().datasets.ImageFolder(folder, prepare)
    return torch.utils.data.DataLoader(dataset, batch, shuffle=shuffle)


WAYS = {"tutorial": tutorial, "timm": timm}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help=".pth in torchvision's layout")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    classes = sum(path.is_dir() for path in (options.data / "train").iterdir())
    model = network(options.weights, classes)
    WAYS[options.way](model, options.data, options.image_size, options.epochs)
    print(json.dumps({"top1": score(model, options.data, options.image_size)}))


if __name__ == "__main__":
    main()
