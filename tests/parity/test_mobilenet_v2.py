"""The network against torchvision's and mmpretrain's MobileNetV2, in float64 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from mbv2_jax.models.layers import make_divisible
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from tests.support import peers
from tests.support.float64 import assert_same, noise

WIDTH = 0.25


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 64, 64, 3))


@pytest.fixture(scope="module")
def torchvision_model() -> torch.nn.Module:
    model = peers.torchvision().models.MobileNetV2(num_classes=7, width_mult=WIDTH, dropout=0.0)
    peers.randomize(model, seed=0)
    return model.double()


def test_logits_are_torchvisions(torchvision_model):
    peer = torchvision_model
    peer.eval()
    with torch.no_grad():
        expected = peer(peers.nchw(images())).numpy()
    with jax.enable_x64(True):
        variables = {"params": peers.parameters(peer), "batch_stats": peers.statistics(peer)}
        model = MobileNetV2(num_classes=7, width=WIDTH, dtype=jnp.float64)
        logits = jax.jit(model.apply)(variables, images())
        assert logits.dtype == jnp.float64
        assert_same({"logits": logits}, {"logits": expected})


def test_a_training_step_is_torchvisions(torchvision_model):
    peer = torchvision_model
    peer.train()
    peer.zero_grad()
    with jax.enable_x64(True):
        params, stats = peers.parameters(peer), peers.statistics(peer)
        model = MobileNetV2(num_classes=7, width=WIDTH, dtype=jnp.float64)

        def loss(params, x):
            logits, state = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return (logits * noise(logits.shape)).sum(), (logits, state["batch_stats"])

        (dparams, dx), (logits, new_stats) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
            params, images()
        )

    x = peers.nchw(images()).requires_grad_()
    y = peer(x)
    (y * torch.from_numpy(noise(tuple(y.shape)))).sum().backward()
    assert_same(
        {"logits": logits, "images": dx, "params": dparams, "statistics": new_stats},
        {
            "logits": y.detach().numpy(),
            "images": peers.nhwc(x.grad),
            "params": peers.gradients(peer),
            "statistics": peers.statistics(peer),
        },
    )


def test_make_divisible_is_torchvisions():
    make = peers.torchvision().models._utils._make_divisible
    channels = [
        base * width
        for base in (16, 24, 32, 64, 96, 160, 320, 1280)
        for width in np.linspace(0.1, 2.0, 39)
    ]
    assert [make_divisible(c) for c in channels] == [make(c, 8) for c in channels]


@pytest.mark.parametrize(
    ("frozen_stages", "norm_eval"), [(2, False), (0, True)], ids=["frozen", "norm_eval"]
)
def test_a_training_step_with_frozen_parts_is_mmpretrains(frozen_stages, norm_eval):
    """The same outputs, gradients (none where frozen) and statistics as the real backbone."""
    peer = peers.mmpretrain().models.MobileNetV2(
        widen_factor=WIDTH, out_indices=(2, 7), frozen_stages=frozen_stages, norm_eval=norm_eval
    )
    peers.randomize(peer, seed=1)
    peer.double()
    peer.train()
    with jax.enable_x64(True):
        params, stats = peers.parameters(peer), peers.statistics(peer)
        model = MobileNetV2(
            num_classes=None,
            width=WIDTH,
            out_indices=(2, 7),
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            dtype=jnp.float64,
        )

        def loss(params, x):
            features, state = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            value = sum((f * noise(f.shape)).sum() for f in features)
            return value, (features, state["batch_stats"])

        (dparams, dx), (features, new_stats) = jax.jit(
            jax.grad(loss, argnums=(0, 1), has_aux=True)
        )(params, images())

    x = peers.nchw(images()).requires_grad_()
    outputs = peer(x)
    value = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        n, c, h, w = y.shape
        value = value + (y * peers.nchw(noise((n, h, w, c)))).sum()
    value.backward()
    expected_stats = peers.statistics(peer)
    assert_same(
        {"images": dx, "params": dparams, "statistics": new_stats}
        | {str(i): f for i, f in enumerate(features)},
        {"images": peers.nhwc(x.grad), "params": peers.gradients(peer)}
        | {"statistics": expected_stats}
        | {str(i): peers.nhwc(y) for i, y in enumerate(outputs)},
    )
    # That this case froze what its name says, and the peer does it, too.
    assert peer.conv1.conv.weight.grad is None
    stem_moved = (expected_stats["stem"]["norm"]["mean"] != stats["stem"]["norm"]["mean"]).any()
    assert stem_moved != norm_eval


# Fresh networks: ours and mmpretrain's, both drawn at random, so compared as distributions.


@pytest.fixture(scope="module")
def mmpretrain_init() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    models = peers.mmpretrain().models
    classifier = models.ImageClassifier(
        backbone={"type": "MobileNetV2"},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 1000, "in_channels": 1280},
    )
    classifier.init_weights()
    return flatten_dict(peers.parameters(classifier), sep="/")


@pytest.fixture(scope="module")
def our_init() -> dict[str, np.ndarray]:
    quickly = {"xla_backend_optimization_level": 0}  # most of the time is the compiler's
    init = jax.jit(MobileNetV2().init, compiler_options=quickly)
    variables = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return {k: np.asarray(v) for k, v in flatten_dict(variables["params"], sep="/").items()}


def test_initial_shapes(mmpretrain_init, our_init):
    peer, ours = mmpretrain_init, our_init
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in peer.items()}


def test_initial_norms_and_biases(mmpretrain_init, our_init):
    peer, ours = mmpretrain_init, our_init
    for path, values in peer.items():
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(ours[path], values, err_msg=path)


def test_initial_kernels(mmpretrain_init, our_init):
    peer, ours = mmpretrain_init, our_init
    kernels = [path for path in peer if path.endswith("kernel")]
    assert len(kernels) == 53
    for path in kernels:
        n = peer[path].size
        # The deviation of n normal numbers has a relative standard error of 1 / sqrt(2 n), the
        # ratio of two such 1 / sqrt(n). Five of these come by chance once in two million.
        ratio = ours[path].std() / peer[path].std()
        assert abs(ratio - 1) < 5 / np.sqrt(n), path
        # The mean's error is 1 / sqrt(n) deviations; of the difference of two sqrt(2) times it.
        difference = ours[path].mean() - peer[path].mean()
        assert abs(difference) < 5 * np.sqrt(2 / n) * peer[path].std(), path


def test_initial_kernels_are_normal_not_truncated(mmpretrain_init, our_init):
    peer, ours = mmpretrain_init, our_init
    for path in ("last/conv/kernel", "classifier/kernel"):
        beyond = [(abs(k[path]) > 2.5 * k[path].std()).mean() for k in (peer, ours)]
        # 1.24 % of a normal distribution; the share among n >= 409,600 has a standard error of
        # sqrt(0.0124 / n) < 0.02 %, and 0.13 % is five of the difference of two.
        assert abs(beyond[0] - beyond[1]) < 0.0013, path
        assert beyond[0] > 0.01
