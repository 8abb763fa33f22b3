"""Prediction and features through Python; the peers are in tests/parity/test_prediction.py."""

import contextlib
import copy
import dataclasses
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from PIL import Image

import mbv2_jax
from mbv2_jax import inference, model_dir
from mbv2_jax.data.classes import IMAGENET_NAMES
from mbv2_jax.errors import UserError
from mbv2_jax.inference import Predictor, list_images
from mbv2_jax.ops.lowering import plain_lowering
from mbv2_jax.spec import Preprocessing
from tests.support import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, three images as PNG files, and two files that are not images."""
    names = ["0.png", "1.png", "2.png"]
    return tiny_model.write_images(tmp_path_factory.mktemp("prediction"), names)


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return mbv2_jax.init_model(folder / "model")


def pixels(count: int) -> np.ndarray:
    shape = (count, tiny_model.SIZE, tiny_model.SIZE, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_and_normalised_floats_give_the_same_logits(predictor):
    images = pixels(4)
    logits = predictor(images)
    assert logits.shape == (4, 6)
    assert logits.dtype == np.float32
    mean, std = np.asarray(tiny_model.MEAN, np.float32), np.asarray(tiny_model.STD, np.float32)
    normalised = (images.astype(np.float32) - mean) / std
    # XLA's float32 quotients are within an ulp of numpy's, 2e-7 of a pixel; logits reach 10.
    np.testing.assert_allclose(logits, predictor(normalised), rtol=0, atol=1e-4)
    assert np.ptp(logits) > 1  # they depend on the image


def test_logits_of_an_image_do_not_depend_on_those_beside_it(predictor):
    images = pixels(4)
    alone = np.concatenate([predictor(images[i : i + 1]) for i in range(4)])
    # Another batch size orders the sums of up to 1,280 float32 terms differently; logits reach 10.
    np.testing.assert_allclose(predictor(images), alone, rtol=0, atol=1e-4)


def test_jax_arrays_are_taken_too(predictor):
    images = pixels(4)
    np.testing.assert_array_equal(predictor(jnp.asarray(images)), predictor(images))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((4, 3, 32, 32), r"\(N, 3, H, W\) = \(4, 3, 32, 32\): give \(N, H, W, 3\)"),
        ((32, 32, 3), r"shape \(32, 32, 3\): give \(N, H, W, 3\)"),
        ((4, 32, 32, 1), r"shape \(4, 32, 32, 1\)"),
        ((4, 32, 32, 4), r"shape \(4, 32, 32, 4\)"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_other_shapes_are_refused_by_name(predictor, shape, dtype, named):
    with pytest.raises(UserError, match=named):
        predictor(np.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.bool_])
def test_other_dtypes_are_refused_by_name(predictor, dtype):
    with pytest.raises(UserError, match=f"{np.dtype(dtype).name}: give uint8"):
        predictor(np.zeros((1, 32, 32, 3), dtype))


@pytest.mark.parametrize("value", ["0.png", [np.zeros((32, 32, 3), np.uint8)]])
def test_what_is_no_array_is_refused_with_what_takes_it(predictor, value):
    with pytest.raises(UserError, match=f"{type(value).__name__}: give an array.*predict"):
        predictor(value)


def test_path_bytes_pil_image_and_array_are_the_same_image(predictor, folder):
    path = folder / "0.png"
    image = tiny_model.photo(0)
    expected = predictor.prepare(path)
    assert expected.shape == (32, 32, 3)
    assert expected.dtype == np.uint8
    for same in (str(path), path.read_bytes(), image, image.convert("RGBA"), np.asarray(image)):
        np.testing.assert_array_equal(predictor.prepare(same), expected)


def test_opened_image_is_turned_upright_as_its_file_is(predictor, tmp_path):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    tiny_model.photo(0).save(file, exif=exif)
    with Image.open(file) as opened:
        ours = predictor.prepare(opened)
    np.testing.assert_array_equal(ours, predictor.prepare(file))
    untold = tmp_path / "untold.jpg"
    tiny_model.photo(0).save(untold)
    assert not np.array_equal(ours, predictor.prepare(untold))


def test_preparing_is_the_models_evaluation_transform(predictor):
    # resize_edge(36)|center_crop(32) of 70 x 50: the short side becomes 36, the long one 50.4, cut.
    resized = tiny_model.photo(0).resize((50, 36), Image.Resampling.BILINEAR)
    expected = resized.crop((9, 2, 41, 34))
    np.testing.assert_array_equal(predictor.prepare(tiny_model.photo(0)), np.asarray(expected))


def test_what_is_no_image_is_refused_by_name(predictor, folder):
    with pytest.raises(UserError, match=r"missing\.png: No such file"):
        predictor.prepare(folder / "missing.png")
    with pytest.raises(UserError, match=r"text\.png: cannot decode"):
        predictor.prepare(folder / "text.png")
    with pytest.raises(UserError, match=r"half\.png: cannot decode"):
        predictor.prepare(str(folder / "half.png"))
    with pytest.raises(UserError, match="cannot decode"):
        predictor.prepare(b"")
    with pytest.raises(UserError, match=f"{folder}: Is a directory"):
        predictor.prepare(folder)


def test_an_opened_image_whose_file_is_cut_short_is_refused(predictor, folder):
    with Image.open(folder / "half.png") as opened, pytest.raises(UserError, match="cannot decode"):
        predictor.prepare(opened)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_rgb_pixels_are_refused(predictor, value):
    with pytest.raises(UserError, match=r"give uint8 \(H, W, 3\)"):
        predictor.prepare(value)


@pytest.mark.parametrize("value", [None, 7, [[0, 0, 0]]])
def test_other_types_are_refused(predictor, value):
    with pytest.raises(UserError, match=type(value).__name__):
        predictor.prepare(value)


def test_prediction_has_mmpretrains_keys_and_names_the_largest_logit(predictor):
    image = tiny_model.photo(1)
    logits = np.asarray(predictor(predictor.prepare(image)[None])[0], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()

    found = mbv2_jax.inference_model(predictor, image)
    assert list(found) == ["pred_label", "pred_class", "pred_score", "pred_scores"]
    assert type(found["pred_label"]) is int
    assert found["pred_label"] == probabilities.argmax()
    assert found["pred_class"] == tiny_model.CLASSES[probabilities.argmax()]
    # A float32 softmax of six logits.
    np.testing.assert_allclose(found["pred_scores"], probabilities, rtol=1e-5, atol=0)
    assert type(found["pred_score"]) is float
    assert found["pred_score"] == found["pred_scores"].max()


def results_are_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["pred_label"] == theirs["pred_label"]
        assert ours["pred_class"] == theirs["pred_class"]
        # Other batch sizes order the sums of up to 1,280 float32 terms differently.
        np.testing.assert_allclose(ours["pred_scores"], theirs["pred_scores"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_many_images_of_every_kind_are_predicted_in_order(predictor, folder, batch_size):
    images = [
        folder / "0.png",
        str(folder / "1.png"),
        (folder / "2.png").read_bytes(),
        tiny_model.photo(3),
        np.asarray(tiny_model.photo(4)),
    ]
    alone = [mbv2_jax.inference_model(predictor, tiny_model.photo(i)) for i in range(5)]
    results_are_equal(predictor.predict(images, batch_size=batch_size), alone)
    results_are_equal(mbv2_jax.inference_model(predictor, iter(images)), alone)
    assert len({each["pred_score"] for each in alone}) == 5  # five different predictions


def compiled() -> int:
    return inference._apply._cache_size()  # type: ignore[attr-defined]


def test_many_images_are_compiled_once(predictor):
    before = compiled()
    assert len(predictor.predict([tiny_model.photo(i) for i in range(8)], batch_size=3)) == 8
    assert compiled() == before + 1
    # 5 and 6 images both run as 8.
    predictor.predict([tiny_model.photo(i) for i in range(5)])
    before = compiled()
    predictor.predict([tiny_model.photo(i) for i in range(6)])
    assert compiled() == before


def test_folder_stands_for_the_images_in_it_and_below(predictor, tmp_path):
    names = ["b.png", "a.JPG", "c/d/e.webp", "c/f.png", ".hidden.png", ".cache/g.png", "notes.txt"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            (tmp_path / name).write_text("no image")
        else:
            tiny_model.photo(i).save(tmp_path / name)
    listed = [tmp_path / name for name in ("a.JPG", "b.png", "c/f.png", "c/d/e.webp")]
    assert list_images(tmp_path) == list(map(str, listed))
    assert list_images([str(tmp_path), "x.png"]) == [*map(str, listed), "x.png"]
    results_are_equal(
        mbv2_jax.inference_model(predictor, tmp_path), predictor.predict(listed, batch_size=1)
    )


def test_a_folder_with_a_link_to_itself_is_listed_once(tmp_path):
    (tmp_path / "a").mkdir()
    tiny_model.photo(0).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert list_images(tmp_path) == [str(tmp_path / "a" / "0.png")]
    assert list_images(tmp_path / "c") == [str(tmp_path / "c" / "0.png")]  # links are followed


def test_folder_of_one_image_gives_a_list(predictor, tmp_path):
    tiny_model.photo(0).save(tmp_path / "0.png")
    found = mbv2_jax.inference_model(predictor, tmp_path)
    assert [each["pred_label"] for each in found] == [
        mbv2_jax.inference_model(predictor, tiny_model.photo(0))["pred_label"]
    ]


def test_folder_without_images_is_refused(predictor, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=f"no image files in {tmp_path} or below; looked for .jpg"):
        predictor.predict(tmp_path)


def test_no_images_give_no_predictions_and_no_features(predictor):
    assert predictor.predict([]) == []
    assert mbv2_jax.inference_model(predictor, []) == []
    assert predictor.extract_feat([]).shape == (0, 1280)
    assert predictor(pixels(0)).shape == (0, 6)


def test_a_bad_image_among_many_is_named(predictor, folder):
    good, missing = folder / "0.png", folder / "missing.png"
    with pytest.raises(UserError, match=r"missing\.png: No such file"):
        predictor.predict([good, missing, good])
    with pytest.raises(UserError, match=r"missing\.png: No such file"):
        predictor.extract_feat([good, missing, good])
    with pytest.raises(UserError, match=r"images\[2\]: cannot decode"):
        predictor.predict([good, good.read_bytes(), good.read_bytes()[:1000]], batch_size=2)
    with pytest.raises(UserError, match=r"images\[1\]: an image is a int"):
        predictor.predict([good, 7])


def test_stream_goes_on_after_a_bad_image(predictor, folder):
    images = [folder / name for name in ("text.png", "0.png", "half.png", "missing.png", "1.png")]
    outcomes = list(predictor.stream(images, batch_size=2))
    assert [isinstance(outcome, UserError) for outcome in outcomes] == [
        True,
        False,
        True,
        True,
        False,
    ]
    expected = predictor.predict([folder / "0.png", folder / "1.png"])
    results_are_equal([outcomes[1], outcomes[4]], expected)


def test_the_same_opened_image_several_times_is_one_image(predictor, folder):
    with Image.open(folder / "0.png") as opened:  # the threads read its file
        found = predictor.predict([opened] * 20)
    expected = mbv2_jax.inference_model(predictor, tiny_model.photo(0))
    results_are_equal(found, [expected] * 20)


def test_batch_size_has_to_be_positive(predictor):
    with pytest.raises(UserError, match="batch_size=0: give 1 or more"):
        predictor.predict([tiny_model.photo(0)], batch_size=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_floats_of_other_widths_are_taken_as_normalised(predictor, dtype):
    # Eighths, which every dtype represents exactly.
    images = np.random.default_rng(0).integers(-16, 17, (2, 32, 32, 3)) / 8
    logits = predictor(images.astype(dtype))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, predictor(images.astype(np.float32)), rtol=0, atol=1e-4)


def test_floats_that_look_like_pixels_are_refused(predictor):
    images = pixels(2).astype(np.float32)
    for unnormalised in (images, images - 128, jnp.asarray(images, jnp.bfloat16)):
        with pytest.raises(UserError, match=r"look like pixels 0-255.*Preprocessing\.normalize"):
            predictor(unnormalised)
    with pytest.raises(UserError, match=r"normalised ones lie in -2\.\.3\.1"):
        predictor.extract_feat(images)
    predictor(np.random.default_rng(0).standard_normal(images.shape))  # noise for a test
    predictor(images / 255)
    jax.eval_shape(predictor, images)  # values that are traced are not looked at


def test_threads_share_one_program(predictor):
    images = pixels(5)
    start = threading.Barrier(8)

    def predict(_: int) -> np.ndarray:
        start.wait()
        return np.asarray(predictor(images))

    before = compiled()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(predict, range(8)))
    assert compiled() == before + 1
    for result in results:
        np.testing.assert_array_equal(result, predictor(images))


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda", "tpu")], ids=["cpu", "every"])
@pytest.mark.usefixtures("few_layers")
def test_export_with_a_symbolic_batch_gives_the_same_logits(tmp_path, platforms):
    short = mbv2_jax.init_model(tiny_model.write(tmp_path / "model"))
    images = pixels(5)
    context = plain_lowering() if platforms else contextlib.nullcontext()
    for inputs in (images, Preprocessing(mean=(128.0,) * 3, std=(64.0,) * 3).normalize(images)):
        shape = export.symbolic_shape("b, 32, 32, 3")
        argument = jax.ShapeDtypeStruct(shape, inputs.dtype)
        with context:
            made = export.export(jax.jit(short), platforms=platforms)(argument)
        restored = export.deserialize(made.serialize())
        assert restored.platforms == (platforms or ("cpu",))
        for count in (1, 5):
            # Sums of float32 terms in another order; logits reach 10.
            np.testing.assert_allclose(
                restored.call(inputs[:count]), short(inputs[:count]), rtol=0, atol=1e-4
            )


def test_features_of_prepared_images_are_those_of_their_pixels(predictor, folder):
    images = [folder / f"{i}.png" for i in range(3)]
    prepared = np.stack([predictor.prepare(image) for image in images])
    expected = predictor.extract_feat(prepared)
    assert expected.shape == (3, 1280)
    assert expected.dtype == np.float32
    # Another batch size orders float32 sums differently; features reach 6.
    found = predictor.extract_feat(images, batch_size=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-5)
    np.testing.assert_allclose(predictor.extract_feat(images[0]), expected[:1], rtol=0, atol=6e-5)
    maps = predictor.extract_feat(images, "backbone", out_indices=(7, 0), batch_size=2)
    assert [each.shape for each in maps] == [(3, 16, 16, 8), (3, 1, 1, 1280)]
    np.testing.assert_allclose(maps[1].mean((1, 2)), expected, rtol=0, atol=6e-5)


def test_features_are_what_the_classifier_gets(predictor):
    head = tiny_model.variables()["params"]["classifier"]
    images = pixels(2)
    logits = np.asarray(predictor.extract_feat(images)) @ head["kernel"] + head["bias"]
    # Sums of 1,280 float32 terms in another order; logits reach 10.
    np.testing.assert_allclose(predictor(images), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"stage": "nek"}, "no stage 'nek': did you mean 'neck'"),
        ({"stage": "backbone", "out_indices": (8,)}, r"out_indices=\(8,\): give some of 0..7"),
        ({"stage": "backbone", "out_indices": (-1,)}, "give some of 0..7"),
        ({"stage": "backbone", "out_indices": ()}, "give some of 0..7"),
    ],
)
def test_unknown_features_are_refused(predictor, arguments, named):
    with pytest.raises(UserError, match=named):
        predictor.extract_feat(pixels(1), **arguments)


def test_features_of_channels_first_are_refused(predictor):
    with pytest.raises(UserError, match=r"give \(N, H, W, 3\)"):
        predictor.extract_feat(np.zeros((4, 3, 32, 32), np.uint8))


def test_model_of_features_only_has_features_and_refuses_to_predict(predictor, tmp_path):
    variables = tiny_model.variables()
    del variables["params"]["classifier"]
    spec = dataclasses.replace(tiny_model.SPEC, head=None)
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec, classes=())
    model_dir.write(tmp_path / "model", **variables, description=description)
    backbone = mbv2_jax.init_model(tmp_path / "model")
    assert backbone.class_names == ()
    np.testing.assert_array_equal(
        backbone.extract_feat(pixels(2)), predictor.extract_feat(pixels(2))
    )
    for refused in (backbone, backbone.predict):
        with pytest.raises(UserError, match="no head, only features: extract_feat gives"):
            refused(pixels(2))


def test_a_model_whose_logits_are_no_numbers_names_no_class(predictor):
    broken = copy.copy(predictor)
    broken._params = jax.tree.map(lambda array: array * np.float32("nan"), predictor._params)
    with pytest.raises(UserError, match=r"logits are not numbers \(NaN\): the weights in .*model"):
        broken.predict(tiny_model.photo(0))


def test_init_model_refuses_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        mbv2_jax.init_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"'torchvison' is not a file.*did you mean 'torchvision'"):
        mbv2_jax.init_model("torchvison")


@pytest.mark.parametrize(
    ("name", "published", "variant"),
    [
        ("mobilenet_v2", "'mmpretrain', 'torchvision'", "'mobilenet_v2_1.0_224'"),
        ("mobilenetv2_100", "'mmpretrain', 'torchvision'", "'mobilenet_v2_1.0_224'"),
        ("mobilenet_v2_1.0", "'mmpretrain', 'torchvision'", "'mobilenet_v2_1.0_224'"),
        ("mobilenet_v2_1.0_244", "'mmpretrain', 'torchvision'", "'mobilenet_v2_1.0_224'"),
        ("mobilenetv2_050.lamb_in1k", "'timm_0.5', 'd-li14_0.5'", "'mobilenet_v2_0.5_224'"),
        ("mobilenetv2_110d.ra_in1k", "1.1", "'mobilenet_v2_110d'"),
        ("mobilenetv2_120d", "1.2", "'mobilenet_v2_120d'"),
        ("MobileNetV2_0.35_128x", None, None),
    ],
)
def test_a_networks_name_suggests_published_weights_before_random_ones(name, published, variant):
    with pytest.raises(UserError) as refused:
        mbv2_jax.init_model(name)
    message = str(refused.value)
    if published is None:  # not the form of such a name
        assert f"{name!r} is not a file" in message
    else:
        assert f"{name!r} names no model: " in message
        assert 0 < message.index(published) < message.index(variant)


@jax.default_prng_impl("rbg")  # compiles in half the time
def test_variant_gives_a_random_network_with_imagenets_classes(capsys):
    first = mbv2_jax.init_model("mobilenet_v2_0.35_96")
    said = capsys.readouterr().err
    assert said.startswith("mobilenet_v2_0.35_96 has random weights") and "'d-li14_0.35'" in said
    found = mbv2_jax.inference_model(first, tiny_model.photo(0))
    assert found["pred_scores"].shape == (1000,)
    assert found["pred_class"] == IMAGENET_NAMES[found["pred_label"]]
    # resize_edge(109)|center_crop(96), of an image of 192 x 160
    resized = tiny_model.photo(0).resize((192, 160)).resize((130, 109), Image.Resampling.BILINEAR)
    expected = resized.crop((17, 6, 113, 102))
    np.testing.assert_array_equal(
        first.prepare(tiny_model.photo(0).resize((192, 160))), np.asarray(expected)
    )
    images = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    logits = np.asarray(first(images))
    np.testing.assert_array_equal(mbv2_jax.init_model("mobilenet_v2_0.35_96")(images), logits)
    other = mbv2_jax.init_model("mobilenet_v2_0.35_96", seed=1)
    assert not np.array_equal(other(images), logits)


def test_folder_comes_before_the_variant_of_its_name(predictor, tmp_path, monkeypatch):
    tiny_model.write(tmp_path / "mobilenet_v2_0.35_96")
    monkeypatch.chdir(tmp_path)
    assert mbv2_jax.init_model("mobilenet_v2_0.35_96").class_names == tiny_model.CLASSES


def test_a_traced_predictor_leaves_the_platform_to_the_lowering(predictor):
    """So that it can be exported for an accelerator, with the convolutions that are fast there."""
    images = jax.ShapeDtypeStruct((1, *predictor.transform.output_size, 3), np.uint8)
    for_tpu = jax.export.export(jax.jit(predictor), platforms=["tpu"])(images)
    for_cpu = jax.export.export(jax.jit(predictor), platforms=["cpu"])(images)
    assert "stablehlo.convolution" in for_tpu.mlir_module()
    assert "stablehlo.convolution" not in for_cpu.mlir_module()
