"""A .tflite file is read without TensorFlow; tests/parity compares with LiteRT's interpreter."""

import jax
import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.errors import UserError


def test_a_trained_deeplab(check_data):
    """Its head gives TFLite's logits when it reads our feature map."""
    folder = check_data / "golden" / "deeplab_tf"
    path, golden = folder / "deeplabv3_257_mv_gpu.tflite", np.load(folder / "golden.npz")
    with pytest.raises(UserError, match=r"RESIZE_BILINEAR.*--features-only converts the backbone"):
        importer.load(path)
    saved = importer.load(path, features_only=True).saved
    backbone = saved.spec.backbone
    assert (backbone.width, backbone.output_stride, backbone.padding) == (0.5, 8, "same")
    assert not backbone.last_convolution
    assert saved.spec.preprocessing.image_size == 257
    network = saved.task().network(backbone, saved.spec.mode)
    tensors = readers.read(path).tensors

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}/weights"][:, 0, 0].T + tensors[f"{name}/Conv2D_bias"]

    for picture in range(3):
        pixels = golden[f"image_{picture}_u8"][None].astype(np.float32)
        *_, x = jax.jit(network.apply)(saved.variables(), pixels / 127.5 - 1)
        x = np.asarray(x)
        pooled = np.maximum(conv(x.mean((1, 2), keepdims=True), "image_pooling"), 0)
        aspp = np.maximum(conv(x, "aspp0"), 0)
        both = np.concatenate([np.broadcast_to(pooled, aspp.shape), aspp], -1)
        logits = conv(np.maximum(conv(both, "concat_projection"), 0), "logits/semantic")
        theirs = golden[f"logits33_{picture}"]
        assert np.ptp(theirs) > 10
        # Up to 41; float32 rounds at 1e-7 of a map, which 54 layers enlarge.
        np.testing.assert_allclose(logits.reshape(theirs.shape), theirs, atol=1e-3)
