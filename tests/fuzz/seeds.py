"""Real files of every container, to be damaged: small networks, written by their own frameworks."""

import dataclasses
import io
import pathlib
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch

from mbv2_jax import model_dir, tasks
from mbv2_jax.convert import writer
from mbv2_jax.convert.layouts import LAYOUTS
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.detection.settings import Head
from tests.support import detection_graph, keras_files, peers, tiny_model
from tests.support.graph_def import GraphDef

_WIDTH = 0.1


def _network() -> torch.nn.Module:
    model = peers.torchvision().models.mobilenet_v2(width_mult=_WIDTH, num_classes=5)
    peers.randomize(model, seed=0)
    return model


def _detector(folder: pathlib.Path, **conventions: Any) -> SavedModel:
    """Returns a small detector, which it writes into a folder.

    Args:
      folder: of the model.
      conventions: fields of the backbone and of the head, apart from their sizes.
    """
    fields = {field.name for field in dataclasses.fields(Head)}
    own = {name: value for name, value in conventions.items() if name in fields}
    head = Head(num_classes=5, extra_channels=(16, 8, 8, 8), **own)
    rest = {name: value for name, value in conventions.items() if name not in fields}
    backbone = Backbone(width=_WIDTH, bn_epsilon=1e-3, **rest)
    network = tasks.find("detection").for_model(head, ()).network(backbone, TrainingMode())
    variables = tiny_model.filled(model_dir.shapes_of(network))
    spec = ModelSpec("detection", backbone, head, Preprocessing())
    description = Description(spec, tuple("abcde"), {"kind": "made for damage"})
    model_dir.write(folder, variables["params"], variables["batch_stats"], description)
    return model_dir.read(folder)


def _torch_zip(folder: pathlib.Path) -> None:
    model = _network()
    torch.save(model.state_dict(), folder / "state.pth")
    torch.save(model, folder / "whole.pth")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, folder / "checkpoint.pth")
    with tempfile.TemporaryDirectory() as other:
        writer.write(_detector(pathlib.Path(other, "m")), "mmdet", folder / "mmdet.pth")


def _torch_legacy(folder: pathlib.Path) -> None:
    model, old = _network(), {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "state.pth", **old)
    torch.save(model, folder / "whole.pth", **old)


def _safetensors(folder: pathlib.Path) -> None:
    safetensors.torch.save_file(_network().state_dict(), folder / "model.safetensors")


def _keras_model() -> Any:
    keras = peers.keras()
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
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


def _tfjs_zip(folder: pathlib.Path) -> None:
    model = keras_files.write_tfjs(_keras_model(), folder)
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for path in (model, model.with_name("group1-shard1of1.bin")):
            archive.write(path, path.name)
            path.unlink()


def _graph() -> bytes:
    """Returns a frozen graph with TF-slim's names and random weights."""
    layout = LAYOUTS["tf-slim"]
    backbone = dataclasses.replace(layout.backbone, width=_WIDTH)
    network = MobileNetV2(num_classes=None, width=_WIDTH)
    shapes = model_dir.shapes_of(network)
    graph, chance = GraphDef(), np.random.default_rng(0)
    for name, array in layout.arrays(backbone).items():
        tree: Any = shapes
        for key in array.path:
            tree = tree[key]
        back = tuple(array.axes.index(axis) for axis in range(len(array.axes)))
        values = chance.uniform(0.5, 1.5, [tree.shape[axis] for axis in back])
        graph.constant(name, values.astype(np.float32))
    head = "MobilenetV2/Logits/Conv2d_1c_1x1"
    graph.constant(f"{head}/weights", chance.standard_normal((1, 1, 1280, 5)).astype(np.float32))
    graph.constant(f"{head}/biases", np.ones(5, np.float32))
    return graph.content()


def _detection_graph() -> bytes:
    """Returns a frozen graph of SSDLite with the operators that tell its fields."""
    kinds = {"padding": "same", "taps": ("layer6_0/expand", "last"), "anchors": "tensorflow"}
    with tempfile.TemporaryDirectory() as folder:
        saved = _detector(pathlib.Path(folder, "m"), **kinds)
    graph = detection_graph.write(saved.variables(), saved.spec.backbone, saved.spec.head)
    scope = "FeatureExtractor/MobilenetV2"
    taps = (f"{scope}/expanded_conv_13/expansion_output", f"{scope}/Conv_1/Relu6")
    detection_graph.add_operators(graph, taps)
    detection_graph.add_anchors(graph, saved.spec.head.anchor_sizes)
    return graph.content()


def _frozen_graph(folder: pathlib.Path) -> None:
    (folder / "frozen.pb").write_bytes(_graph())
    (folder / "detector.pb").write_bytes(_detection_graph())


def _tgz(folder: pathlib.Path) -> None:
    content = _graph()
    with tarfile.open(folder / "net.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("net/frozen_inference_graph.pb")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def _tflite(folder: pathlib.Path) -> None:
    # Imported here, so that the other containers need no LiteRT.
    from tests.support import tflite_files

    network = tflite_files.Network(Backbone(width=_WIDTH, padding="same"), 64)
    output = network.head(network.build(), 5)
    (folder / "net.tflite").write_bytes(network.content(output))


CONTAINERS: dict[str, Callable[[pathlib.Path], None]] = {
    "torch zip": _torch_zip,
    "torch legacy": _torch_legacy,
    "safetensors": _safetensors,
    "keras": _keras,
    "weights.h5": _weights_h5,
    "h5": _h5,
    "tfjs": _tfjs,
    "tfjs zip": _tfjs_zip,
    "frozen graph": _frozen_graph,
    "tgz": _tgz,
    "tflite": _tflite,
}


def write(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes files of one container into a folder of its name, and returns their paths."""
    own = folder / name
    own.mkdir()
    CONTAINERS[name](own)
    return sorted(path for path in own.iterdir() if path.suffix != ".bin")


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        write(wanted, pathlib.Path(sys.argv[1]))
