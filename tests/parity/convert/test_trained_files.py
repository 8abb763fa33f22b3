"""Trained networks of TensorFlow: their own heads give their recorded results on our maps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbv2_jax.convert import importer, readers

Arrays = Mapping[str, np.ndarray]


def predictor(tensors: Arrays, level: int, kind: str, maps: np.ndarray) -> np.ndarray:
    """Returns the results of a head of TensorFlow's SSDLite: a separable 3x3 convolution."""
    scope = f"BoxPredictor_{level}/{kind}"
    depthwise = tensors[f"{scope}_depthwise/depthwise_weights"].transpose(0, 1, 3, 2)
    norm = {
        name: tensors[f"{scope}_depthwise/BatchNorm/{name}"]
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    layout = ("NHWC", "HWIO", "NHWC")
    x = np.asarray(
        lax.conv_general_dilated(
            jnp.asarray(maps),
            jnp.asarray(depthwise),
            (1, 1),
            "SAME",
            dimension_numbers=layout,
            feature_group_count=maps.shape[-1],
        )
    )
    scale = norm["gamma"] / np.sqrt(norm["moving_variance"] + 1e-3)
    x = np.clip((x - norm["moving_mean"]) * scale + norm["beta"], 0, 6)
    return x @ tensors[f"{scope}/weights"][0, 0] + tensors[f"{scope}/biases"]


def test_a_trained_detection_graph(check_data):
    """Its two heads on the backbone give TensorFlow's results when they read our feature maps."""
    folder = check_data / "golden" / "ssdlite_tf"
    path, golden = folder / "frozen_inference_graph.pb", np.load(folder / "golden.npz")
    imported = importer.load(path, features_only=True)
    saved, tensors = imported.saved, readers.read(path).tensors
    assert (saved.spec.backbone.width, saved.spec.backbone.padding) == (1.0, "same")
    assert (saved.spec.preprocessing.mean, saved.spec.backbone.output_stride) == ((127.5,) * 3, 32)
    assert any("layer_19_1_Conv2d_2_1x1_256" in line for line in imported.summary.values())
    network = saved.task().network(saved.spec.backbone, saved.spec.mode)

    @jax.jit
    def maps(x):
        def wanted(module, _):
            return module.name in ("layer6_0", "last")

        options = {"capture_intermediates": wanted, "mutable": ["intermediates"]}
        _, state = network.apply(saved.variables(), x, **options)
        found = state["intermediates"]
        return found["layer6_0"]["__call__"][0][1], found["last"]["__call__"][0]

    for picture in range(3):
        pixels = golden[f"image_{picture}_u8"][None].astype(np.float32)
        for level, x in enumerate(map(np.asarray, maps(pixels / 127.5 - 1))):
            for kind, key in (("BoxEncodingPredictor", "box"), ("ClassPredictor", "cls")):
                theirs = golden[f"{key}_{level}_{picture}"]
                ours = predictor(tensors, level, kind, x)[0]
                # Up to 10; float32 rounds at 1e-7 of a map, which 54 layers enlarge.
                np.testing.assert_allclose(ours, theirs, atol=1e-3)
                assert np.ptp(theirs) > 3
