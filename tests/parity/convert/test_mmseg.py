"""mmsegmentation's MobileNetV2, read as a backbone."""

import jax
import numpy as np
import torch

import mbv2_jax
from tests.support import peers
from tests.support.convert_command import make_run, refused

MAPS = (1, 2, 4, 6)  # of its configs/_base_/models/*_m-v2-d8*.py


def test_a_trained_segmentor_is_a_backbone(tmp_path, monkeypatch, capsys):
    """Its feature maps are mmseg's, and its decoder is left out by name."""
    peers.mmseg()
    from mmseg.models.backbones import MobileNetV2
    from mmseg.models.decode_heads import FCNHead

    norm = {"type": "BN"}
    segmentor = torch.nn.Module()
    segmentor.backbone = MobileNetV2(out_indices=MAPS, norm_cfg=norm)
    segmentor.decode_head = FCNHead(in_channels=320, channels=16, num_classes=5, norm_cfg=norm)
    peers.randomize(segmentor.eval(), seed=0)
    file = tmp_path / "iter_80000.pth"
    torch.save({"meta": {}, "state_dict": segmentor.state_dict()}, file)
    run = make_run(monkeypatch, capsys)
    error = refused(run(file, f"--output={tmp_path / 'refused'}"))
    assert "decode_head" in error and "--features-only" in error
    code, out, err = run(file, "--features-only", f"--output={tmp_path / 'model'}")
    assert code == 0, err
    assert "decode_head.conv_seg.weight" in out
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3))
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2))
        theirs = [found.numpy().transpose(0, 2, 3, 1) for found in segmentor.double().backbone(x)]
    with jax.enable_x64(True):
        module, variables = mbv2_jax.load(
            tmp_path / "model", features_only=True, out_indices=MAPS, dtype="float64"
        )
        ours = jax.jit(module.apply)(variables, images)
    for mine, other in zip(ours, theirs, strict=True):
        # Sums in float64, in another order.
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-9 * abs(other).max())
