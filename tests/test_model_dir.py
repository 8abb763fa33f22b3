"""Model directories: what is written is read, and what is damaged is refused in a line."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mbv2_jax import model_dir
from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.state import TrainState
from tests.support import tiny_model

# After an array that cannot be read, Orbax's threads complain that its event loop is gone.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def broken(model, tmp_path) -> pathlib.Path:
    """A copy to be damaged; its own path, because tensorstore caches what it read from another."""
    return shutil.copytree(model, tmp_path / "broken")


def by_name(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_holds(saved: model_dir.SavedModel, variables: dict[str, Any]) -> None:
    found = by_name({"params": saved.params, "batch_stats": saved.batch_stats})
    wanted = by_name(variables)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def edit(path: pathlib.Path, change: Callable[[dict], object]) -> None:
    info = json.loads((path / "model.json").read_text())
    change(info)
    (path / "model.json").write_text(json.dumps(info))


def refusal(path: pathlib.Path) -> str:
    """Returns the line with which `path` is refused."""
    with pytest.raises(UserError) as refused:
        model_dir.read(path)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_was_written_is_read_bit_for_bit(model):
    saved = model_dir.read(model)
    assert_holds(saved, tiny_model.variables())
    assert len(saved.info.pop("arrays_sha256")) == 64
    assert saved.info == json.loads(json.dumps(tiny_model.INFO))  # JSON knows no tuples
    assert saved.published is None
    assert not saved.features_only
    assert saved.path == model
    assert saved.class_names == tiny_model.CLASSES
    assert saved.field("data.mean") == tiny_model.MEAN
    assert saved.field("model.strides") == (2, 1, 2, 2, 2, 1, 2, 1)
    assert saved.field("data.eval_transforms") == "resize_edge(36)|center_crop(size)"


def test_values_that_are_not_finite_and_denormal_ones_survive(tmp_path):
    variables = tiny_model.variables()
    odd = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38]
    variables["params"]["classifier"]["bias"] = np.asarray(odd, np.float32)
    model_dir.write(tmp_path / "m", variables["params"], variables["batch_stats"], tiny_model.INFO)
    found = model_dir.read(tmp_path / "m").params["classifier"]["bias"]
    assert found.tobytes() == variables["params"]["classifier"]["bias"].tobytes()


def test_model_json_makes_the_network(model):
    network = model_dir.read(model).module(dropout=0.5, bn_epsilon=1e-3)
    assert (network.width, network.num_classes, network.padding) == (0.1, 6, "torch")
    assert (network.dropout, network.bn_epsilon) == (0.5, 1e-3)


def test_model_json_describes_the_model_and_names_its_format(model):
    info = json.loads((model / "model.json").read_text())
    assert info["format"] == 1
    assert info["architecture"] == {
        "name": "mobilenet_v2",
        "width": 0.1,
        "strides": [2, 1, 2, 2, 2, 1, 2, 1],
        "num_classes": 6,
    }
    assert info["conventions"] == {
        "dropout": 0.2,
        "padding": "torch",
        "bn_epsilon": 1e-5,
        "bn_momentum": 0.9,
    }
    assert info["class_names"] == ["cat", "dog", "eel", "fox", "gnu", "hen"]
    assert info["origin"] == {"kind": "made by a test"}


def test_writing_again_replaces_and_leaves_nothing_behind(tmp_path):
    path = tiny_model.write(tmp_path / "model", seed=0)
    (path / "notes.txt").write_text("of the old model")
    tiny_model.write(path, seed=1)
    assert_holds(model_dir.read(path), tiny_model.variables(seed=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert sorted(entry.name for entry in path.iterdir()) == ["arrays", "model.json"]


def test_the_old_model_stays_if_the_new_arrays_cannot_be_written(tmp_path, monkeypatch):
    path = tiny_model.write(tmp_path / "model", seed=0)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", full)
        with pytest.raises(OSError, match="No space left"):
            tiny_model.write(path, seed=1)
    assert_holds(model_dir.read(path), tiny_model.variables(seed=0))

    tiny_model.write(path, seed=1)  # what the failure left does not stand in the way
    assert_holds(model_dir.read(path), tiny_model.variables(seed=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_model.variables()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(OSError, match="No space left on device"):
        tiny_model.write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_old_model_stays_if_the_new_model_json_cannot_be_written(tmp_path):
    path = tiny_model.write(tmp_path / "model", seed=0)
    arrays = tiny_model.variables(seed=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        model_dir.write(path, arrays["params"], arrays["batch_stats"], {"format": object()})
    assert_holds(model_dir.read(path), tiny_model.variables(seed=0))


def test_both_models_are_whole_while_one_takes_the_place_of_the_other(tmp_path, monkeypatch):
    path = tiny_model.write(tmp_path / "model", seed=0)
    rename = pathlib.Path.rename

    def die_at_the_second(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target == path:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            tiny_model.write(path, seed=1)
    assert_holds(model_dir.read(tmp_path / ".model.old"), tiny_model.variables(seed=0))
    assert_holds(model_dir.read(tmp_path / ".model.new"), tiny_model.variables(seed=1))

    tiny_model.write(path, seed=2)
    assert_holds(model_dir.read(path), tiny_model.variables(seed=2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_nothing_at_the_path_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "neither a model directory" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("content", ["", '{"format": 1, "archi', "\0\0\0", "[1]", "null"])
def test_model_json_that_is_no_json_object_is_refused(broken, content):
    (broken / "model.json").write_text(content)
    assert "model.json" in refusal(broken)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format_is_refused(broken, number):
    edit(broken, lambda info: info.update(format=number))
    assert f"has format {number!r}; this version reads 1" in refusal(broken)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("architecture", "width"),
        ("conventions", "padding"),
        ("preprocessing", "mean"),
        ("preprocessing", None),
        ("class_names", None),
    ],
)
def test_model_json_that_lacks_something_is_refused_by_name(broken, section, key):
    edit(broken, lambda info: info[section].pop(key) if key else info.pop(section))
    assert f"{section}.{key} is missing" if key else f"{section}" in refusal(broken)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        (
            "conventions",
            "padding",
            "valid",
            "model.padding is 'valid': it must be 'torch' or 'same'",
        ),
        ("architecture", "strides", [1, 2], "model.strides is [1, 2]: it must be 8 numbers"),
        ("architecture", "width", "one", "model.width is 'one': it must be a number above 0"),
        ("architecture", "width", float("nan"), "model.width is nan"),
        ("preprocessing", "std", [1, 0, 1], "data.std is [1, 0, 1]"),
        ("preprocessing", "mean", "abc", "data.mean is 'abc'"),
        ("preprocessing", "eval_transforms", 3, "data.eval_transforms is 3"),
        ("architecture", "num_classes", 5, "class_names are 6, architecture.num_classes is 5"),
        (
            "architecture",
            "num_classes",
            None,
            "class_names are 6, architecture.num_classes is None",
        ),
        ("architecture", "name", "mobilenet_v3", "architecture.name is not 'mobilenet_v2'"),
    ],
)
def test_model_json_with_an_impossible_value_is_refused(broken, section, key, value, named):
    edit(broken, lambda info: info[section].update({key: value}))
    assert named in refusal(broken)


def test_arrays_of_another_shape_are_refused_by_name(tmp_path):
    variables = tiny_model.variables()
    variables["params"]["classifier"]["kernel"] = np.zeros((1280, 7), np.float32)
    variables["batch_stats"]["stem"]["norm"]["mean"] = np.zeros(16, np.float32)
    path = tmp_path / "model"
    model_dir.write(path, variables["params"], variables["batch_stats"], tiny_model.INFO)
    message = refusal(path)
    assert "params/classifier/kernel is (1280, 7), not (1280, 6)" in message
    assert "batch_stats/stem/norm/mean is (16,), not (8,)" in message


def test_missing_and_superfluous_arrays_are_refused_by_name(tmp_path):
    variables = tiny_model.variables()
    del variables["params"]["last"]["norm"]["bias"]
    variables["params"]["layer8_0"] = {"scale": np.ones(3, np.float32)}
    path = tmp_path / "model"
    model_dir.write(path, variables["params"], variables["batch_stats"], tiny_model.INFO)
    message = refusal(path)
    assert "params/last/norm/bias is missing" in message
    assert "params/layer8_0/scale is not of this network" in message


def test_a_missing_collection_is_refused_by_name(tmp_path):
    path = tmp_path / "model"
    model_dir.write(path, tiny_model.variables()["params"], {}, tiny_model.INFO)
    assert "batch_stats/stem/norm/mean is missing" in refusal(path)


@pytest.mark.parametrize("lost", ["", "_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0"])
def test_lost_array_files_are_refused(broken, lost):
    victim = broken / "arrays" / lost
    victim.unlink() if victim.is_file() else shutil.rmtree(victim)
    assert "cannot be read" in refusal(broken)


@pytest.mark.parametrize("victim", ["_METADATA", "manifest.ocdbt"])
def test_truncated_array_files_are_refused(broken, victim):
    file = broken / "arrays" / victim
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "cannot be read" in refusal(broken)


def test_arrays_of_another_model_are_noticed(broken, tmp_path):
    other = tiny_model.write(tmp_path / "other", seed=1)
    shutil.rmtree(broken / "arrays")
    shutil.copytree(other / "arrays", broken / "arrays")
    assert "SHA-256" in refusal(broken)


@pytest.mark.parametrize("where", [0.2, 0.4, 0.6, 0.8])
def test_flipped_bits_in_the_arrays_are_noticed(broken, where):
    # They are compressed, without a check sum: some flips give an error, others other numbers.
    file = max((broken / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0x10
    file.write_bytes(content)
    assert "SHA-256" in refusal(broken)


def test_models_of_the_time_before_hash_and_dropout_are_read(broken):
    edit(broken, lambda info: info.pop("arrays_sha256"))
    edit(broken, lambda info: info["conventions"].pop("dropout"))
    saved = model_dir.read(broken)
    assert_holds(saved, tiny_model.variables())
    assert saved.field("model.dropout") == 0.0


@pytest.mark.parametrize("card", [{}, {"top1": 1}, "71.86", {"top1": 1, "top5": 2, "examples": 3}])
def test_published_figures_of_another_form_are_refused(broken, card):
    edit(broken, lambda info: info.update(published=card))
    assert "published is not" in refusal(broken)


def test_class_names_that_would_steer_a_terminal_are_refused(broken):
    edit(broken, lambda info: info["class_names"].__setitem__(0, "\x1b[31mcat"))
    assert "class_names are not all printable" in refusal(broken)


def test_a_link_to_a_model_stays_a_link(tmp_path):
    tiny_model.write(tmp_path / "model", seed=0)
    (tmp_path / "link").symlink_to("model")
    tiny_model.write(tmp_path / "link", seed=1)
    assert (tmp_path / "link").is_symlink()
    assert_holds(model_dir.read(tmp_path / "model"), tiny_model.variables(seed=1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "model"]


def test_a_backbone_without_classifier_is_a_model_too(tmp_path):
    variables = tiny_model.variables()
    del variables["params"]["classifier"]
    info = json.loads(json.dumps(tiny_model.INFO))
    info["architecture"]["num_classes"] = None
    info["class_names"] = []
    model_dir.write(tmp_path / "m", variables["params"], variables["batch_stats"], info)
    saved = model_dir.read(tmp_path / "m")
    assert saved.features_only
    assert saved.class_names == ()
    assert_holds(saved, variables)


def state(step: int, *, with_ema: bool) -> TrainState:
    """A training state: weights of seed `step`, their average of seed 100 + `step`."""
    now = jax.tree.map(jnp.asarray, tiny_model.variables(step))
    average = jax.tree.map(jnp.asarray, tiny_model.variables(100 + step))
    return TrainState(
        step=jnp.int32(step),
        params=now["params"],
        batch_stats=now["batch_stats"],
        opt_state={"trace": jax.tree.map(jnp.zeros_like, now["params"])},
        ema=average if with_ema else None,
    )


def train(workdir: pathlib.Path, steps: list[int], *, with_ema: bool = False) -> pathlib.Path:
    """Makes a workdir with the checkpoints of these steps."""
    config = default.get_config()
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        for step in steps:
            info = tiny_model.INFO | {"origin": {"step": step}}
            checkpoints.save(state(step, with_ema=with_ema), config, info, metrics=None)
    return workdir


@pytest.mark.parametrize("with_ema", [False, True])
def test_workdir_with_checkpoints_is_its_newest_and_its_average_if_there_is_one(
    tmp_path, caplog, with_ema
):
    workdir = train(tmp_path, [9, 10], with_ema=with_ema)  # 9 sorts behind 10 as a text
    caplog.clear()
    saved = model_dir.read(workdir)
    assert not caplog.messages  # which a user would see
    assert_holds(saved, tiny_model.variables(110 if with_ema else 10))
    assert saved.class_names == tiny_model.CLASSES
    assert saved.info["origin"] == {"step": 10}


def test_finished_workdir_is_its_model_until_the_run_goes_on(tmp_path):
    workdir = train(tmp_path, [10])
    arrays = tiny_model.variables(5)
    info = tiny_model.INFO | {"origin": {"step": 10}}
    model_dir.write(workdir / "model", arrays["params"], arrays["batch_stats"], info)
    assert_holds(model_dir.read(workdir), arrays)
    train(workdir, [12])
    assert_holds(model_dir.read(workdir), tiny_model.variables(12))


def test_half_saved_checkpoint_does_not_count(tmp_path):
    workdir = train(tmp_path, [10])
    shutil.copytree(workdir / "checkpoints/10", workdir / "checkpoints/20.orbax-checkpoint-tmp-1")
    assert model_dir.training_steps(workdir) == [10]
    assert_holds(model_dir.read(workdir), tiny_model.variables(10))


@pytest.mark.parametrize("lost", ["model", "state"])
def test_checkpoint_with_lost_files_is_refused(tmp_path, lost):
    workdir = train(tmp_path, [10])
    shutil.rmtree(workdir / "checkpoints/10" / lost)
    assert f"{pathlib.Path('checkpoints/10')}" in refusal(workdir)


def test_workdir_before_its_first_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert model_dir.training_steps(tmp_path) == []
    assert "nor a workdir with a checkpoint" in refusal(tmp_path)
