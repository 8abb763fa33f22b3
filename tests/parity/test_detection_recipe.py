"""The recipe `ssdlite_mobilenet_v2_coco` against the config that mmdet installs."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import peers
from tests.support.recipes import rates, recipe, steps_per_epoch

EXAMPLES = 117_266  # images of train2017 with objects, of 32 pixels or more


@pytest.fixture(scope="module")
def theirs() -> Any:
    """mmdet's config, with its bases."""
    mmdet = peers.mmdet()
    from mmengine.config import Config

    folder = pathlib.Path(str(mmdet.__file__)).parent / ".mim" / "configs" / "ssd"
    return Config.fromfile(folder / "ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py")


def test_fields_are_mmdets(theirs):
    ours = recipe("ssdlite_mobilenet_v2_coco")
    data, model = theirs.train_dataloader, theirs.model
    repeated = data.dataset
    assert ours.batch_size == theirs.auto_scale_lr.base_batch_size
    assert ours.model.bn_group_size == data.batch_size
    assert ours.num_epochs == theirs.max_epochs * repeated.times
    assert ours.log.eval_every_epochs == theirs.train_cfg.val_interval * repeated.times
    assert ours.skip_empty == repeated.dataset.filter_cfg.filter_empty_gt
    assert ours.smallest_side == repeated.dataset.filter_cfg.min_size
    assert ours.data.image_size == theirs.input_size
    assert list(ours.data.mean) == theirs.data_preprocessor.mean
    assert list(ours.data.std) == theirs.data_preprocessor.std
    optimizer = theirs.optim_wrapper.optimizer
    assert (ours.optimizer.name, ours.schedule.base_lr) == ("sgd", optimizer.lr)
    assert ours.optimizer.momentum == optimizer.momentum
    assert ours.optimizer.weight_decay == optimizer.weight_decay
    assert "paramwise_cfg" not in theirs.optim_wrapper  # all parameters decay
    assert ours.optimizer.decay_norm and ours.optimizer.decay_bias
    norms = [model[part].norm_cfg for part in ("backbone", "neck", "bbox_head")]
    for norm in norms:
        assert (ours.model.bn_epsilon, ours.model.bn_momentum) == (norm.eps, 1 - norm.momentum)


def test_boxes_are_mmdets(theirs):
    from mbv2_jax.tasks.detection.settings import Head, Settings

    model, ours, settings = theirs.model, Head(num_classes=80), Settings()
    fields = recipe("ssdlite_mobilenet_v2_coco").model
    # The recipe leaves to the defaults what is mmdet's.
    assert all(fields[name] is None for name in ("taps", "anchors", "anchor_sizes", "scores"))
    anchors = model.bbox_head.anchor_generator
    sizes = [side / theirs.input_size for side in (*anchors.min_sizes, anchors.max_sizes[-1])]
    np.testing.assert_allclose(ours.anchor_sizes, sizes, rtol=1e-12)
    assert list(ours.extra_channels) == list(model.neck.out_channels[2:])
    test, train = model.test_cfg, model.train_cfg
    assert (ours.score_threshold, ours.nms_iou) == (test.score_thr, test.nms.iou_threshold)
    assert (ours.candidates, ours.max_detections) == (test.nms_pre, test.max_per_img)
    assert (settings.negative_ratio, settings.min_negatives) == (train.neg_pos_ratio, 0)


def test_transforms_are_mmdets(theirs):
    """Their numbers, in the order of the operations; ours are the operations' defaults."""
    from mbv2_jax.data.transforms import pipeline

    ours = pipeline.make_transform(recipe("ssdlite_mobilenet_v2_coco").data.train_transforms, 320)
    operations: Any = ours.operations
    expand, crop, resize, flip, distort = operations
    their_expand, their_crop, their_resize, their_flip, their_distort = theirs.train_pipeline[2:-1]
    assert (expand.low, expand.high) == tuple(their_expand.ratio_range)
    assert list(expand.fill) == [int(value) for value in their_expand.mean]
    assert (list(crop.min_ious), crop.smallest) == (
        list(their_crop.min_ious),
        their_crop.min_crop_size,
    )
    assert (resize.scale, resize.scale) == tuple(their_resize.scale)
    assert not their_resize.keep_ratio
    assert flip.prob == their_flip.prob
    for name in ("brightness_delta", "contrast_range", "saturation_range", "hue_delta"):
        assert getattr(distort, name) == getattr(their_distort, name)


def test_rates_are_mmdets_at_the_beginning_of_each_of_its_epochs(theirs):
    from mmengine.optim import scheduler

    config = recipe("ssdlite_mobilenet_v2_coco")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.schedule.base_lr)
    rise, fall = (
        getattr(scheduler, fields.pop("type"))(sgd, **fields)
        for fields in map(dict, theirs.param_scheduler)
    )
    warm_up = []
    for _ in range(500):
        warm_up.append(sgd.param_groups[0]["lr"])
        sgd.step()  # without a gradient: torch warns if it is not called first
        rise.step()
    epochs = []
    for _ in range(theirs.max_epochs):
        epochs.append(sgd.param_groups[0]["lr"])
        fall.step()
    # Theirs reaches the top in 499 steps, ours in 500.
    np.testing.assert_allclose(rates(config, np.arange(500), EXAMPLES), warm_up, rtol=1 / 499)
    # The cosine of theirs begins at step 0, that of ours after the warm-up. The rest of the cosine
    # is then longer by 500 of 366,600 steps, and its square decides the rate at the end.
    total = round(config.num_epochs * steps_per_epoch(config, EXAMPLES))
    assert total == 366_600
    shares = np.arange(1, theirs.max_epochs) / theirs.max_epochs
    ours = rates(config, np.round(shares * total).astype(int), EXAMPLES)
    np.testing.assert_allclose(ours, epochs[1:], rtol=2.1 * 500 / total)
    # Five times the images in batches of 192, in each of their epochs.
    assert theirs.max_epochs * -(-5 * EXAMPLES // 192) == 366_480
