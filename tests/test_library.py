"""`load` and `save`: the network in a person's own code; timm is compared in tests/parity/."""

import functools
import json
import pathlib
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mbv2_jax
from mbv2_jax import inference, model_dir, spec
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.settings import Ema
from tests.support import tiny_model

OWN_TASK = "tests.tasks.test_own_task:MeanColour"
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
# Logits reach 10; folding and other batch sizes order the sums of float32 terms differently.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}

pytestmark = pytest.mark.usefixtures("few_layers")  # most of the time is compilation


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    return tiny_model.write(tmp_path / "checkpoint")


def apply(model: mbv2_jax.LoadedModel, images: np.ndarray = IMAGES):
    module, variables = model
    return jax.jit(module.apply)(variables, model.preprocessing.normalize(images))


def save(path: pathlib.Path, model: mbv2_jax.LoadedModel) -> None:
    module, variables = model
    mbv2_jax.save(path, module, variables, model.class_names, preprocessing=model.preprocessing)


def same(ours, theirs) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_checkpoint_as_it_is_gives_the_predictors_logits(checkpoint):
    model = mbv2_jax.load(checkpoint)
    assert model.class_names == tiny_model.CLASSES
    assert model.preprocessing == tiny_model.SPEC.preprocessing
    assert model.module.dropout == 0.2
    assert (model.module.channels, model.module.reductions) == ((1280,), (2,))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(apply(model), mbv2_jax.init_model(checkpoint)(IMAGES), **CLOSE)
    assert same(mbv2_jax.load(checkpoint, num_classes=6).variables, model.variables)


def test_another_number_of_classes_gives_a_fresh_classifier_of_the_seed(checkpoint, capsys):
    trained = tiny_model.variables()
    models = [mbv2_jax.load(checkpoint, num_classes=3, seed=seed) for seed in (0, 0, 1)]
    assert "with a new classifier: its 6 classes are not these 3" in capsys.readouterr().err
    heads = [model.variables["params"]["classifier"] for model in models]
    assert heads[0]["kernel"].shape == (1280, 3)
    # Normal with a deviation of 0.01, as MobileNetV2's classifier is initialised: of 3,840 numbers
    # the deviation's relative standard error is 1 / sqrt(2 * 3840) = 1.1 %; five of these.
    assert abs(np.std(heads[0]["kernel"]) / 0.01 - 1) < 0.06
    assert same(heads[0], heads[1]) and not same(heads[0]["kernel"], heads[2]["kernel"])
    for name in trained["params"].keys() - {"classifier"}:
        assert same(models[0].variables["params"][name], trained["params"][name])
    assert same(models[0].variables["batch_stats"], trained["batch_stats"])
    assert models[0].class_names == ()
    assert apply(models[0]).shape == (4, 3)


def test_features_have_only_the_layers_that_are_computed(checkpoint):
    model = mbv2_jax.load(checkpoint, features_only=True, out_indices=(6, 0))
    assert model.variables["params"].keys() == {"stem", "layer1_0", "layer7_0"}
    assert (model.module.channels, model.module.reductions) == ((8, 32), (2, 2))
    expected = mbv2_jax.init_model(checkpoint).extract_feat(IMAGES, "backbone", out_indices=(0, 6))
    for ours, theirs, channels in zip(apply(model), expected, model.module.channels, strict=True):
        assert ours.shape[-1] == channels
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    (last,) = apply(mbv2_jax.load(checkpoint, features_only=True))
    assert last.shape == (4, 16, 16, 1280)


def test_a_backbone_alone_is_loaded_and_given_a_classifier(checkpoint, tmp_path):
    module, variables = mbv2_jax.load(checkpoint, features_only=True)
    path = tmp_path / "backbone"
    mbv2_jax.save(path, module, variables, preprocessing=tiny_model.SPEC.preprocessing)
    assert model_dir.read(path).features_only
    assert same(mbv2_jax.load(path).variables, variables)
    model = mbv2_jax.load(path, num_classes=2)
    assert apply(model).shape == (4, 2)
    assert same(model.variables["params"]["last"], variables["params"]["last"])


def test_fields_reach_the_module(checkpoint):
    fields: dict[str, Any] = {"frozen_stages": 2, "norm_eval": True, "dropout": 0.5, "remat": True}
    fields |= {"bn_momentum": 0.99, "bn_group_size": 2, "output_stride": 16}
    module, _ = mbv2_jax.load(checkpoint, dtype=jnp.bfloat16, strides=[1] * 8, **fields)
    for name, value in fields.items():
        assert getattr(module, name) == value
    assert module.dtype == jnp.bfloat16
    assert module.strides == (1,) * 8
    assert module.reductions == (1,)


def test_hidden_layers_are_given_saved_and_kept(checkpoint, tmp_path, capsys):
    model = mbv2_jax.load(checkpoint, hidden=(100,))
    said = capsys.readouterr().err
    assert "a new classifier and hidden_0: its hidden layers are (), not (100,)" in said
    params = model.variables["params"]
    assert (model.module.hidden, model.class_names) == ((100,), tiny_model.CLASSES)
    assert params["hidden_0"]["kernel"].shape == (1280, 100)
    assert params["classifier"]["kernel"].shape == (100, 6)
    # He et al.'s initialisation, truncated at two of its deviations, sqrt(2 / 1280): the relative
    # standard error of 128,000 numbers' deviation is 1 / sqrt(2 * 128000) = 0.2 %.
    assert abs(np.std(params["hidden_0"]["kernel"]) / np.sqrt(2 / 1280) - 1) < 0.01
    assert same(params["last"], tiny_model.variables()["params"]["last"])
    save(tmp_path / "saved", model)
    assert same(mbv2_jax.load(tmp_path / "saved").variables, model.variables)
    predictor = mbv2_jax.init_model(tmp_path / "saved")
    np.testing.assert_allclose(predictor(IMAGES), apply(model), **CLOSE)
    pooled: Any = predictor.extract_feat(IMAGES)
    assert pooled.shape == (4, 1280)  # before the hidden layers
    capsys.readouterr()

    # Other classes: the hidden layers stay, and the classifier is new.
    other = mbv2_jax.load(tmp_path / "saved", num_classes=3)
    assert "with a new classifier: its 6 classes are not these 3" in capsys.readouterr().err
    assert same(other.variables["params"]["hidden_0"], params["hidden_0"])
    assert other.variables["params"]["classifier"]["kernel"].shape == (100, 3)
    assert jnp.shape(apply(other)) == (4, 3)


@pytest.mark.parametrize(("hidden", "kept"), [((100, 50), ["hidden_0"]), ((60, 100), []), ((), [])])
def test_hidden_layers_are_kept_up_to_the_first_of_another_width(
    checkpoint, tmp_path, hidden, kept
):
    first = mbv2_jax.load(checkpoint, hidden=(100, 100), seed=1)
    save(tmp_path / "saved", first)
    model = mbv2_jax.load(tmp_path / "saved", hidden=hidden)
    head = {f"hidden_{i}" for i in range(len(hidden))} | {"classifier"}
    params = model.variables["params"]
    assert {name for name in params if name[:6] in ("hidden", "classi")} == head
    before = first.variables["params"]
    assert [
        name for name in head if same(params[name]["kernel"], before.get(name, {}).get("kernel"))
    ] == kept
    assert apply(model).shape == (4, 6)


def test_a_network_without_the_last_convolution_is_a_model(tmp_path):
    module = mbv2_jax.MobileNetV2(num_classes=2, width=0.1, last_convolution=False)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    path, preprocessing = tmp_path / "model", tiny_model.SPEC.preprocessing
    mbv2_jax.save(path, module, variables, ["a", "b"], preprocessing=preprocessing)
    model = mbv2_jax.load(path)
    assert model.module.last_convolution is False
    assert model.variables["params"].keys() == {"stem", "layer1_0", "layer7_0", "classifier"}
    predictor = mbv2_jax.init_model(path)
    np.testing.assert_allclose(predictor(IMAGES), apply(model), **CLOSE)
    features = mbv2_jax.load(path, features_only=True)
    (last,) = apply(features)  # layer7's map
    assert features.module.channels == last.shape[-1:] == (32,)
    (same_map,) = predictor.extract_feat(IMAGES, "backbone")
    np.testing.assert_allclose(same_map, last, **CLOSE)
    np.testing.assert_allclose(predictor.extract_feat(IMAGES), last.mean((1, 2)), **CLOSE)

    mbv2_jax.save(tmp_path / "backbone", *features, preprocessing=preprocessing)
    assert model_dir.read(tmp_path / "backbone").spec.backbone.last_convolution is False
    for refuse in (
        lambda: mbv2_jax.load(path, features_only=True, out_indices=(7,)),
        lambda: predictor.extract_feat(IMAGES, "backbone", out_indices=(7,)),
    ):
        with pytest.raises(UserError, match=r"out_indices=\(7,\): give some of 0\.\.6"):
            refuse()
    first = mbv2_jax.load(path, features_only=True, out_indices=(0,))
    with pytest.raises(UserError, match="with 6 among its out_indices"):
        mbv2_jax.save(tmp_path / "first", *first, preprocessing=preprocessing)
    with pytest.raises(UserError, match="last_convolution is True, the checkpoint's is False"):
        mbv2_jax.load(path, last_convolution=True)


def test_a_network_begins_and_ends_to_round_to_8_bits(checkpoint, tmp_path):
    floats = mbv2_jax.load(checkpoint)
    rounding = mbv2_jax.load(checkpoint, quantize="int8", norm_eval=True)
    assert rounding.class_names == floats.class_names
    assert rounding.variables["batch_stats"]["pooled_range"] == {"low": 0, "high": 0}
    jax.tree.map(
        np.testing.assert_array_equal, rounding.variables["params"], floats.variables["params"]
    )
    images = rounding.preprocessing.normalize(IMAGES)
    seen = jax.jit(lambda v: rounding.module.apply(v, images, mutable=["batch_stats"])[1])
    updated = seen(rounding.variables)
    path = tmp_path / "rounding"
    mbv2_jax.save(
        path,
        rounding.module,
        {"params": rounding.variables["params"], "batch_stats": updated["batch_stats"]},
        rounding.class_names,
        preprocessing=rounding.preprocessing,
    )
    found = mbv2_jax.load(path)
    assert found.module.quantize == "int8"
    assert found.variables["batch_stats"]["pooled_range"]["high"] > 0
    features = mbv2_jax.load(checkpoint, features_only=True, quantize="int8")
    assert "range" in features.variables["batch_stats"]["stem"]
    features = mbv2_jax.load(path, features_only=True, quantize="none")
    assert set(features.variables["batch_stats"]["stem"]) == {"norm"}
    again = mbv2_jax.load(path, quantize="none")
    assert same(apply(again), apply(floats))
    # Prediction is in floats.
    np.testing.assert_allclose(mbv2_jax.init_model(path)(IMAGES), apply(floats), **CLOSE)


def test_made_up_statistics_are_kept_and_not_trained_with(checkpoint, tmp_path):
    model = mbv2_jax.load(checkpoint)
    module = model.module.clone(folded_norm=True)
    path = tmp_path / "folded"
    mbv2_jax.save(
        path, module, model.variables, model.class_names, preprocessing=model.preprocessing
    )
    found = mbv2_jax.load(path)
    assert found.module.folded_norm
    assert same(apply(found), apply(model))
    np.testing.assert_allclose(mbv2_jax.init_model(path)(IMAGES), apply(model), **CLOSE)

    def train(loaded: mbv2_jax.LoadedModel) -> Any:
        module, variables = loaded
        images = loaded.preprocessing.normalize(IMAGES)
        random = {"dropout": jax.random.key(0)}
        return jax.eval_shape(
            lambda v: module.apply(v, images, train=True, mutable=["batch_stats"], rngs=random),
            variables,
        )

    with pytest.raises(ValueError, match="train with norm_eval=True"):
        train(found)
    logits, _ = train(mbv2_jax.load(path, norm_eval=True))
    assert logits.shape == (4, 6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"depth": 1.2}, "does not fit: depth is 1.2, the checkpoint's is 1.0"),
        ({"fixed_ends": True}, "does not fit: fixed_ends is True"),
        ({"hidden": 100}, "hidden is 100: it must be whole numbers"),
        ({"features_only": True, "hidden": (100,)}, "no field 'hidden'"),
        ({"outputstride": 8}, "no field 'outputstride': did you mean 'output_stride'"),
        ({"output_stride": 7}, "output_stride is 7"),
        ({"width": 1.0}, "checkpoint does not fit: width is 1.0, the checkpoint's is 0.1"),
        ({"padding": "same"}, "does not fit: padding is same, the checkpoint's is torch"),
        ({"bn_epsilon": 1e-3}, "does not fit: bn_epsilon is 0.001"),
        ({"num_classes": 0}, "num_classes is 0: it must be a whole number, 1 or more"),
        ({"frozen_stages": 8}, "frozen_stages is 8"),
        ({"bn_group_size": "device"}, "bn_group_size is 'device': give a number"),
        ({"dtype": "float64"}, "set JAX_ENABLE_X64=1"),
        ({"out_indices": (1,)}, "give features_only=True too"),
        ({"features_only": True, "num_classes": 3}, "give no task and no num_classes"),
        ({"features_only": True, "task": OWN_TASK}, "give no task and no num_classes"),
        ({"features_only": True, "out_indices": (8,)}, r"out_indices=\(8,\): give some of 0..7"),
        ({"features_only": True, "out_indices": ()}, "give some of 0..7"),
        ({"task": "classifcation"}, "task is 'classifcation'"),
        ({"task": OWN_TASK, "num_classes": 3}, "no field 'num_classes'"),
    ],
)
def test_impossible_arguments_are_refused_by_name(checkpoint, arguments, named):
    with pytest.raises(UserError, match=named):
        mbv2_jax.load(checkpoint, **arguments)


def test_values_of_the_checkpoint_may_be_given_again(checkpoint):
    assert mbv2_jax.load(checkpoint, width=0.1, padding="torch").module.width == 0.1


def test_another_task_keeps_the_backbone_and_is_saved(checkpoint, tmp_path):
    model = mbv2_jax.load(checkpoint, task=OWN_TASK, channels=2)
    assert model.variables["params"]["colour"]["kernel"].shape == (32, 2)
    assert "last" not in model.variables["params"]  # that network does without
    for name in ("stem", "layer1_0", "layer7_0"):
        assert same(model.variables["params"][name], tiny_model.variables()["params"][name])
    path = tmp_path / "colour"
    mbv2_jax.save(path, *model, preprocessing=model.preprocessing, task=OWN_TASK, channels=2)
    outputs = mbv2_jax.init_model(path)(IMAGES)
    assert outputs.shape == (4, 2)
    np.testing.assert_allclose(outputs, apply(model), **CLOSE)
    assert same(mbv2_jax.load(path).variables, model.variables)
    # And back: the layers that it lacks are new, and named.
    back = mbv2_jax.load(path, num_classes=6, task="classification")
    assert same(back.variables["params"]["stem"], model.variables["params"]["stem"])
    assert apply(back).shape == (4, 6)
    with pytest.raises(UserError, match="num_classes is missing"):
        mbv2_jax.load(path, task="classification")


@pytest.mark.parametrize("kind", ["jax", "frozen", "bfloat16", "float64"])
def test_saved_model_opens_with_the_same_arrays(checkpoint, tmp_path, kind):
    module, variables = mbv2_jax.load(checkpoint)
    expected = variables
    if kind == "frozen":
        variables = flax.core.freeze(variables)
    elif kind == "bfloat16":
        variables = jax.tree.map(lambda array: array.astype(jnp.bfloat16), variables)
        expected = jax.tree.map(lambda array: array.astype(jnp.float32), variables)
    elif kind == "float64":
        variables = jax.tree.map(lambda array: np.asarray(array, np.float64), variables)
    preprocessing = Preprocessing(48, "resize(size)", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    names = ["a", "b", "c", "d", "e", "f"]
    mbv2_jax.save(tmp_path / "saved", module, variables, names, preprocessing=preprocessing)
    saved = model_dir.read(tmp_path / "saved")
    assert saved.classes == tuple(names)
    assert saved.spec.preprocessing == preprocessing
    assert saved.spec.mode.dropout == 0.2
    assert "mbv2_jax.save" in saved.description.origin["kind"]
    assert same(saved.variables(), expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(saved.variables())} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_names": ()}, "0 names, and the module has 6 classes"),
        ({"class_names": "abcdef"}, "class_names is the text 'abcdef'"),
        ({"class_names": ["a", "b", "c", "d", "e", "f\n"]}, "give printable text"),
        ({"variables": {}}, 'variables must be {"params": ..., "batch_stats": ...}'),
        ({"preprocessing": Preprocessing(0)}, "preprocessing.image_size is 0"),
        ({"preprocessing": Preprocessing(32, "random_crop(size)")}, "is random"),
        ({"task": OWN_TASK}, "is a MeanColourNetwork: give the task of the module"),
        ({"task": "segmentation"}, "is a DeepLabV3: give the task of the module"),
        ({"channels": 3}, "the head has no field 'channels'"),
    ],
)
def test_faults_of_a_model_are_named_before_anything_is_written(
    checkpoint, tmp_path, change, named
):
    model = mbv2_jax.load(checkpoint)
    arguments = {"module": model.module, "variables": model.variables}
    arguments |= {"class_names": model.class_names, "preprocessing": model.preprocessing}
    with pytest.raises(UserError, match=named):
        mbv2_jax.save(tmp_path / "saved", **arguments | change)
    assert not (tmp_path / "saved").exists()


def test_layers_before_the_last_convolution_are_no_model(checkpoint, tmp_path):
    model = mbv2_jax.load(checkpoint, features_only=True, out_indices=(0, 6))
    with pytest.raises(UserError, match=r"the maps \(0, 6\), and ends before the last"):
        save(tmp_path / "saved", model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v["params"].pop("stem"), "params/stem/conv/kernel is missing"),
        (lambda v: v["params"].update(more=np.zeros(1)), "params/more is not of this network"),
        (
            lambda v: v["params"]["classifier"].update(bias=np.zeros(5)),
            r"params/classifier/bias is \(5,\), not \(6,\)",
        ),
        (
            lambda v: v["params"]["classifier"].update(bias=np.zeros(6, np.int32)),
            "params/classifier/bias is int32, not floating",
        ),
        (
            lambda v: v["params"]["classifier"].update(bias=np.full(6, np.nan)),
            "params/classifier/bias is not finite",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(checkpoint, tmp_path, change, named):
    model = mbv2_jax.load(checkpoint)
    change(model.variables)
    with pytest.raises(UserError, match=named):
        save(tmp_path / "saved", model)


def test_only_a_model_directory_is_replaced(checkpoint, tmp_path):
    model = mbv2_jax.load(checkpoint)
    save(checkpoint, model)
    assert json.loads((checkpoint / "model.json").read_text())["origin"]["sha256"]
    (checkpoint / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for path in (checkpoint, tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="exists, and is not a model directory"):
            save(path, model)
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        save(tmp_path / "file" / "below", model)
    save(tmp_path / "empty", model)
    assert (checkpoint / "notes.txt").read_text() == "mine"


def test_pixels_are_normalised_on_the_host_and_on_devices():
    preprocessing = Preprocessing(mean=(100.0, 110.0, 120.0), std=(50.0, 55.0, 60.0))
    expected = np.array([(0 - 100) / 50, (110 - 110) / 55, (240 - 120) / 60], np.float32)
    pixels = np.broadcast_to(np.array([0, 110, 240], np.uint8), (2, 3, 3, 3))
    host = preprocessing.normalize(pixels)
    assert type(host) is np.ndarray
    np.testing.assert_array_equal(host, np.broadcast_to(expected, (2, 3, 3, 3)))
    device = preprocessing.normalize(jnp.asarray(pixels))
    assert isinstance(device, jax.Array)
    for found in (device, jax.jit(preprocessing.normalize)(pixels)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, host, rtol=2e-7)  # an ulp of XLA's quotient
    # In bfloat16 alone, 237 - 120 would be rounded to 118 before the division.
    narrow = preprocessing.normalize(np.full((1, 1, 3), 237, np.uint8), "bfloat16")
    assert narrow.dtype == jnp.bfloat16
    assert float(narrow[0, 0, 2]) == float(jnp.bfloat16(117 / 60))


def test_images_are_prepared_as_a_predictor_does(checkpoint):
    preprocessing = tiny_model.SPEC.preprocessing
    # resize_edge(36)|center_crop(32) of 70 x 50, as in test_inference.py
    expected = tiny_model.photo(0).resize((50, 36), 2).crop((9, 2, 41, 34))
    np.testing.assert_array_equal(preprocessing.prepare(tiny_model.photo(0)), np.asarray(expected))
    with pytest.raises(UserError, match=r"missing\.png: No such file"):
        preprocessing.prepare(checkpoint / "missing.png")


def own_step(model: mbv2_jax.LoadedModel, optimizer, labels: np.ndarray):
    """Returns the parameters, statistics and loss after one step as docs/library.md writes it."""
    module, variables = model

    def loss_of(params):
        logits, updated = module.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            model.preprocessing.normalize(IMAGES),
            train=True,
            mutable=["batch_stats"],
        )
        return mbv2_jax.cross_entropy(logits, labels).mean(), updated["batch_stats"]

    def step(params):
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), stats, loss

    return jax.jit(step)(variables["params"])


def test_train_step_by_itself_is_a_step_of_ones_own(checkpoint):
    model = mbv2_jax.load(checkpoint, frozen_stages=1, dropout=0.0)
    labels = np.array([0, 1, 2, 3])
    moves = mbv2_jax.trainable(model.variables["params"], 1)
    optimizer = optax.partition(
        {
            True: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01)),
            False: optax.set_to_zero(),
        },
        moves,
    )
    params, stats, loss = own_step(model, optimizer, labels)
    recipe = step_lib.Recipe(
        Classification(), model.module, model.preprocessing, optimizer, ema=Ema(decay=0.75)
    )
    state = state_lib.from_variables(model.variables, optimizer=optimizer, with_ema=True)
    train = jax.jit(functools.partial(step_lib.train_step, recipe=recipe))
    after, metrics = train(state, {"image": IMAGES, "label": labels}, jax.random.key(0))

    assert metrics.keys() == {"loss", "top1", "grad_norm"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for ours, theirs in ((after.params, params), (after.batch_stats, stats)):
        # One program and another: float32 sums in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), ours, theirs)
    before = model.variables["params"]
    for name in ("stem", "layer1_0"):
        assert same(after.params[name], before[name])
    for name in ("layer7_0", "last", "classifier"):
        assert not same(after.params[name], before[name])
    jax.tree.map(
        lambda mean, old, new: np.testing.assert_allclose(
            mean, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-6
        ),
        after.evaluated()["params"],
        before,
        after.params,
    )


def test_endpoints_of_a_backbone_have_channels_and_reductions():
    backbone = mbv2_jax.Backbone(spec.Backbone(strides=(2,) * 8), endpoints=("layer7_0", "stem"))
    assert (backbone.channels, backbone.reductions) == ((320, 32), (8, 2))  # strides of 3 layers


def test_every_public_name_resolves():
    for name in mbv2_jax.__all__:
        assert getattr(mbv2_jax, name) is not None
    assert {"load", "save"} <= set(dir(mbv2_jax))


def test_loaded_arrays_are_the_models_own(checkpoint):
    """A step that is given the buffers of one model leaves another one as it is."""
    saved = inference.open_model(checkpoint, 0)
    first, second = mbv2_jax.load(checkpoint), mbv2_jax.load(checkpoint)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree), donate_argnums=0)
    doubled(first.variables)
    assert same(second.variables, saved.variables())
