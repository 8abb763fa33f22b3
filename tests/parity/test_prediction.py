"""A prediction from the file to the class, against torchvision's transforms and network."""

import numpy as np
import torch
from PIL import Image

import mbv2_jax
from mbv2_jax import model_dir
from tests import tiny_model
from tests.parity import peers


def test_prediction_of_a_file_is_torchvisions(tmp_path):
    torchvision = peers.torchvision()
    network = torchvision.models.mobilenet_v2(num_classes=6, width_mult=0.1).eval()
    peers.randomize(network, seed=0)
    model_dir.write(
        tmp_path / "model", peers.parameters(network), peers.statistics(network), tiny_model.INFO
    )
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((70, 51), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")

    transforms = torchvision.transforms
    prepare = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),  # pixels / 255
            transforms.Normalize(np.divide(tiny_model.MEAN, 255), np.divide(tiny_model.STD, 255)),
        ]
    )
    with torch.no_grad():
        logits = network(prepare(Image.open(tmp_path / "photo.png"))[None])[0]
    theirs = torch.softmax(logits, 0).numpy()
    assert theirs.max() < 0.999  # else softmax would hide differences

    classifier = mbv2_jax.init_model(tmp_path / "model")
    ours = mbv2_jax.inference_model(classifier, tmp_path / "photo.png")
    # float32 through 52 layers, whose sums are ordered differently; logits are of order ten.
    np.testing.assert_allclose(ours["pred_scores"], theirs, rtol=0, atol=1e-4)
    assert ours["pred_label"] == theirs.argmax()
    assert ours["pred_class"] == tiny_model.CLASSES[theirs.argmax()]
