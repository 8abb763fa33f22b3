"""Keras's MobileNetV2, under the names of TF-slim's frozen graph, which is the same network."""

import numpy as np
import pytest

from mbv2_jax.convert import importer
from mbv2_jax.convert.published import PUBLISHED
from tests.support import outputs, peers
from tests.support.graph_def import GraphDef

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def slim_name(layer: str) -> str:
    """Returns TF-slim's name of a layer of keras.applications."""
    ends = {
        "Conv1": "Conv",
        "bn_Conv1": "Conv/BatchNorm",
        "Conv_1": "Conv_1",
        "Conv_1_bn": "Conv_1/BatchNorm",
        "predictions": "Logits/Conv2d_1c_1x1",
    }
    if layer in ends:
        return f"MobilenetV2/{ends[layer]}"
    block, part = layer.removesuffix("_BN").rsplit("_", 1)
    block = block.replace("block_", "expanded_conv_")
    return f"MobilenetV2/{block}/{part}" + ("/BatchNorm" if layer.endswith("_BN") else "")


def graph(model) -> bytes:
    """Returns a frozen graph with the weights of Keras's network."""
    found = GraphDef()
    found.placeholder("input", -1, outputs.SIZE, outputs.SIZE, 3)
    names = {"depthwise_kernel": "depthwise_weights", "kernel": "weights", "bias": "biases"}
    for layer in model.layers:
        for variable in layer.weights:
            name = variable.name
            if "depthwise" in layer.name and name == "kernel":
                name = "depthwise_kernel"
            array = peers.keras().ops.convert_to_numpy(variable)
            if layer.name == "predictions" and name == "kernel":
                array = array[None, None]  # a 1x1 convolution there
            found.constant(f"{slim_name(layer.name)}/{names.get(name, name)}", array)
    return found.content()


@pytest.mark.parametrize("width", [0.35, 1.4])
def test_logits(width, tmp_path):
    keras = peers.keras()
    shape = (outputs.SIZE, outputs.SIZE, 3)
    model = keras.applications.MobileNetV2(
        shape, alpha=width, weights=None, classes=1001, classifier_activation=None
    )
    draw = np.random.default_rng(0)
    for variable in model.weights:
        one = "gamma" in variable.name or "variance" in variable.name
        fan = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 25
        if "depthwise" in variable.path and len(variable.shape) > 1:
            fan = 9
        noise = draw.normal(0, np.sqrt(2 / fan), variable.shape)
        variable.assign(np.abs(1 + noise / 2) + 0.1 if one else noise)
    (tmp_path / "slim_frozen.pb").write_bytes(graph(model))
    imported = importer.load(tmp_path / "slim_frozen.pb")
    saved = imported.saved
    assert saved.spec.backbone.width == width
    assert saved.spec.preprocessing.image_size == outputs.SIZE
    assert len(saved.classes) == 1001
    assert saved.classes[:2] == ("background", "tench, Tinca tinca")
    x = outputs.images().astype(np.float32)
    theirs = keras.ops.convert_to_numpy(model(x, training=False))
    assert theirs.std() > 0.1
    ours = outputs.of_converted(saved, x.astype(np.float64)).logits
    assert ours is not None
    # Keras computes in float32, which rounds at 1e-7; 53 layers enlarge that.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * abs(theirs).max())


def test_the_evaluation_is_the_published_one():
    """TF-slim's preprocessing keeps the central 0.875 of each side."""
    for name, weights in PUBLISHED.items():
        if name.startswith("tf-slim"):
            size = weights.preprocessing.image_size
            edge = int(weights.preprocessing.eval_transforms.partition("(")[2].partition(")")[0])
            assert abs(size / edge - 0.875) < 0.01
            assert name == f"tf-slim_{weights.width}_{size}"
