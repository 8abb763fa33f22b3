"""Our results against the stored ones of the peers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.data.transforms import augment
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.data.transforms.resize_and_crop import RandomResizedCrop
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.tasks.classification import scores
from mbv2_jax.training.schedule import schedule
from mbv2_jax.training.settings import Optimizer, Schedule
from tests.golden import inputs
from tests.support import optimizer_steps, schedules, train_steps
from tests.support.samples import change, pixels

RNG = np.random.default_rng(0)  # for transforms that draw nothing


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(inputs.FOLDER / f"{name}.npz"))


def hashes(name: str) -> dict[str, str]:
    return json.loads((inputs.FOLDER / f"{name}.json").read_text())


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Asserts that no difference exceeds a share of the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_logits_and_feature_maps_are_torchvisions_and_mmpretrains():
    golden = load("network")
    variables = inputs.variables(inputs.WIDTH, inputs.CLASSES)
    with jax.enable_x64(True):
        sizes = {"width": inputs.WIDTH, "dtype": jnp.float64}
        classifier = MobileNetV2(num_classes=inputs.CLASSES, **sizes)
        logits = jax.jit(classifier.apply)(variables, inputs.images())
        backbone = MobileNetV2(num_classes=None, out_indices=tuple(range(8)), **sizes)
        params = {
            name: value for name, value in variables["params"].items() if name != "classifier"
        }
        maps = jax.jit(backbone.apply)(variables | {"params": params}, inputs.images())
    # float64 rounds at 1e-16, which 53 layers enlarge to 2e-13; a wrong operation gives 1e-4.
    assert_close(logits, golden["logits"], 1e-11)
    for index, each in enumerate(maps):
        assert_close(each, golden[f"map{index}"], 1e-11)


def test_padding_and_epsilon_are_kerass():
    variables = jax.tree.map(np.float32, inputs.variables(inputs.KERAS_WIDTH, inputs.CLASSES))
    network = MobileNetV2(
        num_classes=inputs.CLASSES, width=inputs.KERAS_WIDTH, padding="same", bn_epsilon=1e-3
    )
    logits = jax.jit(network.apply)(variables, inputs.images().astype(np.float32))
    # Both compute in float32: measured 9e-7 in the files of tests/parity/test_conversion.py.
    assert_close(logits, load("keras")["logits"], 1e-5)


def test_training_is_mmpretrains():
    golden = load("training")
    config = train_steps.make_config(**{"model.dtype": "float64", "label_smoothing": 0.0})
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.asarray, inputs.training_variables())
        mesh = mesh_lib.create(jax.devices()[:1])
        (*_, state), log = train_steps.run(config, mesh, variables, inputs.STEPS)
    # The two order their sums differently: 1e-16, which each step and its 53 layers amplify.
    np.testing.assert_allclose([line["loss"] for line in log], golden["losses"], rtol=1e-7)
    params, stats = state.params, state.batch_stats
    for name, ours in (
        ("stem", params["stem"]["conv"]["kernel"]),
        ("depthwise", params["layer4_1"]["depthwise"]["conv"]["kernel"]),
        ("bias", params["classifier"]["bias"]),
        ("variance", stats["layer7_0"]["project"]["norm"]["var"]),
    ):
        assert_close(ours, golden[name], 1e-7)


def test_learning_rates_are_torchs_and_mmengines():
    golden = load("schedule")
    cosine = schedules.settings("cosine", min_lr=0.02)
    schedules.assert_close(schedules.ours(cosine), golden["cosine"])
    for settings in (
        schedules.settings("step", milestones=(3, 5, 10), factor=0.2),
        schedules.settings("exponential", factor=0.9),
    ):
        by_epoch = np.repeat(golden[settings.name], schedules.STEPS_PER_EPOCH)
        schedules.assert_close(schedules.ours(settings), by_epoch)
    page = Schedule("exponential", base_lr=0.045, factor=0.98)
    with jax.enable_x64(True):
        rate = schedule(page, 256, 5, 5 * len(golden["page"]))
        ours = jax.jit(jax.vmap(rate))(5 * jnp.arange(len(golden["page"])))
    # mmengine multiplies 300 float64 factors, each of which rounds by 1e-16.
    np.testing.assert_allclose(ours, golden["page"], rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torchs(smoothing):
    golden = load("cross_entropy")
    values, labels = inputs.logits()

    def losses(values: jax.Array) -> jax.Array:
        return scores.cross_entropy(values, jnp.asarray(labels), smoothing)

    with jax.enable_x64(True):
        found = losses(jnp.asarray(values))
        gradient = jax.grad(lambda values: losses(values).mean())(jnp.asarray(values))
    # Sums of ten float64 terms of up to 20; probabilities over 32 examples.
    np.testing.assert_allclose(found, golden[f"losses {smoothing}"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradient, golden[f"gradient {smoothing}"], rtol=0, atol=1e-16)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", Optimizer(momentum=0.9, weight_decay=0.04)),
        ("nesterov", Optimizer(momentum=0.9, nesterov=True)),
        ("adamw", Optimizer("adamw", betas=(0.8, 0.95), epsilon=1e-3, weight_decay=0.3)),
    ],
)
def test_optimizers_are_torchs(name, settings):
    golden = load("optimizer")
    with jax.enable_x64(True):
        history = optimizer_steps.run_ours(
            settings, optimizer_steps.draw(0), optimizer_steps.gradients()
        )
    for path, value in history[-1].items():
        # Twelve float64 steps of some ten operations, each of which rounds by 1.1e-16.
        np.testing.assert_allclose(value, golden[f"{name} {path}"], rtol=1e-12, atol=1e-13)


def test_crops_are_mmpretrains_and_torchvisions(monkeypatch):
    found = {}
    for size in inputs.CROP_SIZES:
        for interpolation in ("bilinear", "bicubic"):
            spec = f"resize_edge(101, interpolation='{interpolation}')|center_crop(90)"
            crop = pixels(make_transform(spec, 224), inputs.photo(*size), RNG)
            found[f"{interpolation} {size[0]} x {size[1]}"] = inputs.sha256(crop)
    for box in inputs.BOXES:
        monkeypatch.setattr(RandomResizedCrop, "box", lambda *_, box=box: box)
        resized = change(RandomResizedCrop(96), inputs.photo(500, 375), RNG)
        found["box " + " ".join(map(str, box))] = inputs.sha256(resized)
    assert found == hashes("transforms")


def test_operations_are_torchvisions():
    image = inputs.photo(*inputs.OPERATIONS_SIZE)
    found = {}
    for name, highest in augment.usual_table(*image.size).items():
        arguments: list[float | None] = [None]
        if highest is not None:
            arguments = [
                sign * augment.magnitude_of(name, highest, index, inputs.BINS)
                for index, sign in inputs.magnitude_bins(name in augment.SIGNED)
            ]
        found[name] = inputs.sha256(*(augment.apply(name, image, each) for each in arguments))
    assert found == hashes("operations")
