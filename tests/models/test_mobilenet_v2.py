"""The fields of the network change what they promise to change, and nothing else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mbv2_jax import spec
from mbv2_jax.models.layers import ConvNorm
from mbv2_jax.models.mobilenet_v2 import (
    Backbone,
    MobileNetV2,
    blocks,
    feature_info,
    map_endpoints,
    trainable,
)
from mbv2_jax.ops.normalization import materialize

STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)
FEATURES_AT_224 = [
    (112, 112, 16),
    (56, 56, 24),
    (28, 28, 32),
    (14, 14, 64),
    (14, 14, 96),
    (7, 7, 160),
    (7, 7, 320),
    (7, 7, 1280),
]


def network(**fields: Any) -> MobileNetV2:
    """The smallest network of its kind."""
    return MobileNetV2(**{"num_classes": 5, "width": 0.25, "strides": STRIDES, **fields})


def images(batch: int = 4, size: int = 16, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, size, size, 3), dtype)


def random_variables(model: MobileNetV2) -> dict[str, Any]:
    """Variables as training could have left them: no zeros, no ones, variances positive."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(dtype=model.dtype))
    values = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        noise = rng.standard_normal(leaf.shape)
        if path.endswith("kernel"):
            noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif path.endswith(("scale", "var")):
            noise = 1 + 0.3 * np.tanh(noise)
        else:
            noise *= 0.1
        values[path] = jnp.asarray(noise, leaf.dtype)
    return unflatten_dict(values, sep="/")


def loss_and_state(model: MobileNetV2, x: jax.Array):
    """A function of (params, batch_stats): a loss, and the new batch_stats."""

    def loss(params, batch_stats):
        logits, state = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(len(x)) % logits.shape[-1]
        ).mean(), state["batch_stats"]

    return loss


def changed(before: Any, after: Any) -> dict[str, bool]:
    """Path -> whether any element differs."""
    new = flatten_dict(after, sep="/")
    return {
        path: bool(np.any(np.asarray(old) != np.asarray(new[path])))
        for path, old in flatten_dict(before, sep="/").items()
    }


def gradients_and_statistics(**fields: Any) -> tuple[Any, Any]:
    """Returns those of one training step in float64, as numpy arrays."""
    with jax.enable_x64(True):
        model = network(dtype=jnp.float64, **fields)
        variables = random_variables(model)
        loss = loss_and_state(model, images(dtype=jnp.float64))
        step = jax.jit(jax.grad(loss, has_aux=True))
        result = step(variables["params"], variables["batch_stats"])
        return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize("out_indices", [(7,), (0, 1, 2, 3, 4, 5, 6, 7), (2, 4, 6), (6, 1)])
def test_feature_maps(out_indices):
    model = MobileNetV2(num_classes=None, out_indices=out_indices)
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert [f.shape for f in features] == [(2, *FEATURES_AT_224[i]) for i in sorted(out_indices)]
    assert "classifier" not in variables["params"]


ARCHITECTURES = {
    "paper": spec.Backbone(),
    "narrow": spec.Backbone(width=0.35, strides=STRIDES),
    "wide": spec.Backbone(width=1.4, padding="same"),
    "output stride 8": spec.Backbone(output_stride=8),
    "output stride 16": spec.Backbone(output_stride=16, padding="same"),
    "deep": spec.Backbone(width=1.1, depth=1.2, fixed_ends=True, output_stride=16),
    "TensorFlow's DeepLab": spec.Backbone(width=0.5, divisor=1, last_convolution=False),
    "shallow": spec.Backbone(depth=0.3),
    "no last convolution": spec.Backbone(last_convolution=False),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_feature_info_is_the_networks(architecture):
    info = feature_info(architecture)
    backbone = Backbone(architecture, endpoints=tuple(info))
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features, _ = jax.eval_shape(backbone.init_with_output, jax.random.key(0), x)
    assert features.keys() == info.keys()
    for name, (channels, reduction) in info.items():
        side = 224 // reduction
        assert features[name].shape == (2, side, side, channels), name


def test_feature_info_by_hand():
    info = feature_info()
    assert len(info) == 1 + 17 + 16 + 1  # stem, blocks, all but one expansion, last
    assert info["stem"] == (32, 2)
    assert info["layer1_0"] == (16, 2)
    assert "layer1_0/expand" not in info
    assert info["layer2_0/expand"] == (96, 2)
    assert info["layer2_0"] == (24, 4)
    assert info["layer6_0/expand"] == (576, 16)  # SSDLite's first tap (section 6.2)
    assert info["layer7_0"] == (320, 32)
    assert info["last"] == (1280, 32)


@pytest.mark.parametrize(
    ("depth", "counts"),
    [
        (0.3, (1, 1, 1, 2, 1, 1, 1)),
        (1.2, (1, 3, 4, 5, 4, 4, 1)),  # of 2, 3, 4, 3 and 3 blocks: 2.4, 3.6, 4.8, 3.6, 3.6
        (1.4, (1, 3, 5, 6, 5, 5, 1)),
    ],
)
def test_depth_multiplies_the_blocks_of_the_inner_stages(depth, counts):
    architecture = spec.Backbone(depth=depth)
    names = [f"layer{i}_{j}" for i, count in enumerate(counts, start=1) for j in range(count)]
    assert [block.name for block in blocks(architecture)] == names
    for block in blocks(architecture):  # the first block of a stage has its stride
        first = block.name.endswith("_0")
        assert block.stride == (architecture.strides[block.stage] if first else 1)
    shapes = jax.eval_shape(MobileNetV2(depth=depth).init, jax.random.key(0), images())
    assert shapes["params"].keys() == {"stem", *names, "last", "classifier"}
    ends = tuple(f"layer{i}_{count - 1}" for i, count in enumerate(counts, start=1))
    assert map_endpoints(architecture) == (*ends, "last")


@pytest.mark.parametrize("width", [0.5, 1.2])
def test_fixed_ends_have_the_same_channels_at_any_width(width):
    fixed, scaled = (
        feature_info(spec.Backbone(width=width, fixed_ends=fixed)) for fixed in (True, False)
    )
    assert (fixed["stem"].channels, fixed["last"].channels) == (32, 1280)
    assert scaled["stem"].channels != 32
    inner = [name for name in scaled if not name.startswith(("stem", "last", "layer2_0/expand"))]
    assert [fixed[name] for name in inner] == [scaled[name] for name in inner]


def test_without_the_last_convolution_layer7_is_the_last_map(few_layers):
    x = images()
    whole, short = network(), network(last_convolution=False)
    variables = random_variables(whole)
    variables = {kind: variables[kind] for kind in ("params", "batch_stats")}
    (layer7,) = jax.jit(whole.clone(num_classes=None, out_indices=(6,)).apply)(variables, x)
    kernel, bias = np.full((layer7.shape[-1], 5), 0.1), np.arange(5.0)
    del variables["params"]["last"], variables["batch_stats"]["last"]
    variables["params"]["classifier"] = {"kernel": kernel, "bias": bias}
    shapes = jax.eval_shape(short.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    assert short.channels == layer7.shape[-1:]
    (features,) = jax.jit(short.clone(num_classes=None).apply)(variables, x)
    # The same float32 operations, fused otherwise.
    np.testing.assert_allclose(features, layer7, atol=1e-4)
    expected = np.asarray(layer7).mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(jax.jit(short.apply)(variables, x), expected, atol=1e-3)


def test_hidden_layers_are_dense_with_relu(few_layers):
    x = images()
    model = network(hidden=(6, 4))
    variables = random_variables(model)
    params = variables["params"]
    assert params["hidden_0"]["kernel"].shape == (1280, 6)
    assert params["classifier"]["kernel"].shape == (4, 5)
    (features,) = jax.jit(model.clone(num_classes=None).apply)(variables, x)
    expected = np.asarray(features, np.float64).mean((1, 2))
    for name in ("hidden_0", "hidden_1"):
        expected = expected @ params[name]["kernel"] + params[name]["bias"]
        assert 0 < (expected > 0).mean() < 1
        expected = np.maximum(expected, 0)
    expected = expected @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    # Features reach 6, and two programs round the same float32 operations differently.
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-4)


def test_dropout_is_before_each_dense_layer(few_layers):
    model, x = network(hidden=(64,), dropout=0.5, norm_eval=True), images()
    variables = random_variables(model)
    found: dict[str, Any] = {}

    def watch(run, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            found["/".join(context.module.path)] = np.asarray(args[0])
        return run(*args, **kwargs)

    def zeros(train: bool) -> list[float]:
        with nn.intercept_methods(watch):
            model.apply(variables, x, train=train, rngs={"dropout": jax.random.key(2)})
        return [float((found[name] == 0).mean()) for name in ("hidden_0", "classifier")]

    evaluated, trained = zeros(False), zeros(True)
    # ReLU makes some zeros of its own. Of 4 x 64 outputs, half of the rest is 6 standard errors
    # from less than a third.
    for before, after in zip(evaluated, trained, strict=True):
        assert after > before + (1 - before) / 3


@pytest.mark.parametrize("head", [{}, {"num_classes": None}])
def test_made_up_statistics_are_not_trained_with(head):
    def trace(**fields: Any) -> Any:
        model = network(**head, folded_norm=True, **fields)
        variables = jax.eval_shape(model.init, jax.random.key(0), images())
        return jax.eval_shape(
            lambda v: model.apply(v, images(), train=True, mutable=["batch_stats"]), variables
        )

    with pytest.raises(ValueError, match=r"folded_norm: .*: train with norm_eval=True"):
        trace()
    assert trace(norm_eval=True)


@pytest.mark.parametrize("train", [False, True])
def test_endpoints_are_the_layers_outputs(train, few_layers):
    backbone = Backbone(
        spec.Backbone(width=0.25, strides=STRIDES),
        endpoints=("last", "stem", "layer1_0", "layer7_0/expand", "layer7_0"),
    )
    x = images()
    variables = jax.jit(backbone.init)(jax.random.key(1), x)

    def layer(x, train, path, **fields):
        entries = {
            kind: variables[kind][path[0]][path[1]] if len(path) > 1 else variables[kind][path[0]]
            for kind in ("params", "batch_stats")
        }
        y, _ = ConvNorm(**fields).apply(entries, x, train, mutable=["batch_stats"])
        return materialize(y)

    @jax.jit
    def run(x):
        return backbone.apply(variables, x, train, mutable=["batch_stats"])[0]

    features = run(x)
    assert features.keys() == set(backbone.endpoints)
    inner = 6 * features["layer1_0"].shape[-1]
    by_layer = {
        "stem": layer(x, train, ["stem"], features=8, kernel_size=3),
        "layer7_0/expand": layer(
            features["layer1_0"], train, ["layer7_0", "expand"], features=inner
        ),
        "last": layer(features["layer7_0"], train, ["last"], features=1280),
    }
    for name, expected in by_layer.items():
        # The same float32 operations, fused otherwise.
        np.testing.assert_allclose(features[name], expected, atol=1e-4, err_msg=name)


def test_layers_after_the_last_endpoint_do_not_exist():
    def layers(*endpoints: str) -> set[str]:
        backbone = Backbone(endpoints=endpoints)
        return set(jax.eval_shape(backbone.init, jax.random.key(0), images())["params"])

    whole = layers("stem", "last")
    assert len(whole) == 1 + 17 + 1
    assert layers("layer7_0") == whole - {"last"}
    assert layers("layer2_1", "stem") == {"stem", "layer1_0", "layer2_0", "layer2_1"}


@pytest.mark.parametrize("name", ["layer1_0/expand", "layer2_2", "head"])
def test_unknown_endpoints_are_refused(name):
    with pytest.raises(ValueError, match=f"there is no endpoint '{name}'"):
        jax.eval_shape(Backbone(endpoints=(name,)).init, jax.random.key(0), images())


@pytest.mark.parametrize(
    ("output_stride", "dilations"),
    [
        (32, {}),
        (16, {"layer6_1": 2, "layer6_2": 2, "layer7_0": 2}),
        (
            8,
            {f"layer4_{j}": 2 for j in (1, 2, 3)}
            | {f"layer5_{j}": 2 for j in range(3)}
            | {"layer6_0": 2, "layer6_1": 4, "layer6_2": 4, "layer7_0": 4},
        ),
    ],
)
def test_dilations_are_deeplabs(output_stride, dilations):
    """The dilations and strides of TensorFlow's deeplab, written out."""
    strides = {"layer2_0": 2, "layer3_0": 2, "layer4_0": 2, "layer6_0": 2}
    lost = {32: [], 16: ["layer6_0"], 8: ["layer4_0", "layer6_0"]}[output_stride]
    for block in blocks(spec.Backbone(output_stride=output_stride)):
        stride = 1 if block.name in lost else strides.get(block.name, 1)
        assert (block.stride, block.dilation) == (stride, dilations.get(block.name, 1)), block.name


def test_strides_that_never_reach_the_output_stride_stay():
    small = spec.Backbone(strides=STRIDES)  # 8 pixels of the image per pixel of the last map
    assert feature_info(small) == feature_info(dataclasses.replace(small, output_stride=16))
    many = spec.Backbone(strides=(2,) * 8)
    assert feature_info(many)["last"].reduction == 256


class Counter(nn.Module):
    """A network with a head of its own."""

    @nn.compact
    def __call__(self, x):
        backbone = Backbone(spec.Backbone(width=0.25), endpoints=("layer5_2",))
        nn.share_scope(self, backbone)
        return nn.Dense(1, name="count")(backbone(x)["layer5_2"].mean((1, 2)))


def test_another_network_has_the_same_names():
    def names(model: nn.Module) -> set[str]:
        shapes = jax.eval_shape(model.init, jax.random.key(0), images())
        return set(flatten_dict(shapes, sep="/"))

    other, own = names(Counter()), names(network())
    assert {name for name in own if "layer5" in name} <= other
    assert other - own == {"params/count/kernel", "params/count/bias"}


def test_frozen_stages_stay_under_weight_decay(few_layers):
    model, x = network(frozen_stages=2), images()
    variables = random_variables(model)
    params, statistics = variables["params"], variables["batch_stats"]
    optimizer = optax.multi_transform(
        {True: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))}
        | {False: optax.set_to_zero()},
        trainable(params, 2),
    )

    @jax.jit
    def step(params, statistics):
        gradients, new = jax.grad(loss_and_state(model, x), has_aux=True)(params, statistics)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return gradients, optax.apply_updates(params, updates), new

    gradients, new_params, new_statistics = step(params, statistics)
    frozen = ("stem/", "layer1_")
    for path, moved in changed(params, new_params).items():
        assert moved != path.startswith(frozen), path
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert bool(np.any(np.asarray(gradient))) != path.startswith(frozen), path
    for path, moved in changed(statistics, new_statistics).items():  # the stem's do move
        assert moved != path.startswith(frozen[1:]), path


def test_trainable_names_what_is_frozen():
    params = jax.eval_shape(network().init, jax.random.key(0), images())["params"]
    for frozen_stages in range(-1, 8):
        mask = trainable(params, frozen_stages)
        assert flatten_dict(mask).keys() == flatten_dict(params).keys()
        expected = {"stem"} if frozen_stages >= 0 else set()
        expected |= {n for n in params if n[:5] == "layer" and int(n[5]) <= frozen_stages}
        for path, moves in flatten_dict(mask).items():
            assert moves is (path[0] not in expected)
    with pytest.raises(ValueError, match="frozen_stages must lie in"):
        trainable(params, 8)


def test_bfloat16_computes_near_float32_and_keeps_float32_state():
    x = images()
    half, single = network(dtype=jnp.bfloat16), network()
    variables = random_variables(single)
    shapes = jax.eval_shape(half.init, jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    gradients, statistics = jax.eval_shape(
        jax.grad(loss_and_state(half, x), has_aux=True),
        variables["params"],
        variables["batch_stats"],
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}
    (features,) = jax.eval_shape(half.clone(num_classes=None).apply, variables, x)
    assert features.dtype == jnp.bfloat16

    logits = [jax.jit(model.apply)(variables, x) for model in (half, single)]
    assert logits[0].dtype == jnp.float32
    # Each of 52 layers rounds its kernel, its convolution's output and its own to 8 bits (at most
    # 0.4 %): independent, they add up to 0.4 % x sqrt(156), 5 %. Three times that is allowed, since
    # the last average cancels much of the features but not of their errors. Noise would give 140 %;
    # no difference would mean that nothing was rounded.
    error = float(jnp.linalg.norm(logits[0] - logits[1]) / jnp.linalg.norm(logits[1]))
    assert 1e-4 < error < 0.15


def test_float64_keeps_float64_state():
    with jax.enable_x64(True):
        x = images(dtype=jnp.float64)
        logits, variables = jax.eval_shape(
            network(dtype=jnp.float64).init_with_output, jax.random.key(0), x
        )
        leaves = [logits, *jax.tree.leaves(variables)]
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


def test_remat_gives_the_same_gradients_and_statistics(few_layers):
    plain_step, remat_step = gradients_and_statistics(), gradients_and_statistics(remat=True)
    for expected, got in zip(plain_step, remat_step, strict=True):
        for path, value in flatten_dict(expected, sep="/").items():
            # The same float64 arithmetic, fused otherwise: 1e-16 grows through normalisations.
            scale = np.abs(value).max()
            difference = np.abs(flatten_dict(got, sep="/")[path] - value).max()
            assert difference <= 1e-10 * scale, path


def test_remat_recomputes_each_block(few_layers):
    x = images()

    def saved(model: MobileNetV2) -> int:
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        jaxpr = jax.make_jaxpr(jax.grad(loss_and_state(model, x), has_aux=True))(
            variables["params"], variables["batch_stats"]
        )
        return sum(equation.primitive.name.startswith("remat") for equation in jaxpr.eqns)

    assert saved(network()) == 0
    assert saved(network(remat=True)) == 2  # one for each block's backward pass


def test_dropout_drops_pooled_features_in_training_only():
    x = images()
    model = network(dropout=1.0)  # all of them, so that the logits are the bias
    variables = random_variables(model)
    apply = jax.jit(
        lambda variables, train: model.apply(
            variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
        )[0],
        static_argnums=1,
    )
    bias = np.broadcast_to(variables["params"]["classifier"]["bias"], (len(x), 5))
    np.testing.assert_array_equal(apply(variables, True), bias)
    assert np.abs(apply(variables, False) - bias).min() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding": "valid"}, "padding must be 'torch' or 'same', not 'valid'"),
        ({"strides": (2, 1)}, "strides must be 8 of 1 or 2"),
        ({"strides": (2, 1, 2, 2, 2, 1, 2, 4)}, "strides must be 8 of 1 or 2"),
        ({"out_indices": (8,)}, "out_indices must lie in 0..7"),
        ({"out_indices": (7,), "last_convolution": False}, "out_indices must lie in 0..6"),
        ({"depth": 0}, "depth must be above 0, not 0"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, not 4"),
        ({"frozen_stages": 8}, "frozen_stages must lie in -1..7, not 8"),
        ({"bn_group_size": -1}, "bn_group_size must be 0 or more, not -1"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network(**fields).init, jax.random.key(0), images())


@pytest.mark.parametrize("x", [jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((8, 8, 3))])
def test_wrong_images_are_refused(x):
    with pytest.raises(ValueError, match="floating and normalised"):
        jax.eval_shape(network().init, jax.random.key(0), x)
