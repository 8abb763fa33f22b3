"""Model directories: they are read as they were written, and damage is refused in one line."""

import dataclasses
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
import tensorstore

from mbv2_jax import model_dir
from mbv2_jax.errors import UserError
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.settings import Checkpoint
from mbv2_jax.training.state import TrainState
from tests.support import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def broken(model, tmp_path) -> pathlib.Path:
    """A copy to be damaged, at a path of its own: tensorstore caches files by their path."""
    return shutil.copytree(model, tmp_path / "broken")


def write(path: pathlib.Path, variables: dict[str, Any], **changes: Any) -> pathlib.Path:
    """Writes a model directory with these variables and the tiny model's changed description."""
    description = dataclasses.replace(tiny_model.DESCRIPTION, **changes)
    model_dir.write(path, variables["params"], variables["batch_stats"], description)
    return path


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
    """Returns the error, one line, with which `path` is refused."""
    with pytest.raises(UserError) as refused:
        model_dir.read(path)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_was_written_is_read_bit_for_bit(model):
    saved = model_dir.read(model)
    assert_holds(saved, tiny_model.variables())
    assert saved.description == tiny_model.DESCRIPTION
    assert saved.description.published is None
    assert not saved.features_only
    assert saved.path == model
    assert saved.classes == tiny_model.CLASSES
    assert saved.spec.preprocessing.mean == tiny_model.MEAN
    assert saved.spec.backbone.strides == (2, 1, 2, 2, 2, 1, 2, 1)
    assert saved.spec.preprocessing.eval_transforms == "resize_edge(36)|center_crop(size)"


def test_values_that_are_not_finite_and_denormal_ones_survive(tmp_path):
    variables = tiny_model.variables()
    odd = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38]
    variables["params"]["classifier"]["bias"] = np.asarray(odd, np.float32)
    found = model_dir.read(write(tmp_path / "m", variables)).params["classifier"]["bias"]
    assert found.tobytes() == variables["params"]["classifier"]["bias"].tobytes()


def test_model_json_makes_the_network(model):
    saved = model_dir.read(model)
    network = saved.module()
    assert (network.width, network.num_classes, network.padding) == (0.1, 6, "torch")
    assert (network.dropout, network.bn_epsilon) == (0.2, 1e-5)
    spec = saved.spec.replace({"model.dropout": 0.5, "model.bn_epsilon": 1e-3})
    changed = saved.task().network(spec.backbone, spec.mode)
    assert changed == network.clone(dropout=0.5, bn_epsilon=1e-3)


def test_model_json_describes_the_model_and_names_its_format(model):
    info = json.loads((model / "model.json").read_text())
    assert len(info.pop("arrays_sha256")) == 64
    assert info == {
        "format": 2,
        "task": "classification",
        "backbone": {
            "name": "mobilenet_v2",
            "width": 0.1,
            "strides": [2, 1, 2, 2, 2, 1, 2, 1],
            "padding": "torch",
            "bn_epsilon": 1e-5,
            "output_stride": 32,
            "depth": 1.0,
            "fixed_ends": False,
            "last_convolution": True,
            "divisor": 8,
        },
        "head": {"num_classes": 6, "hidden": []},
        "preprocessing": {
            "image_size": 32,
            "eval_transforms": "resize_edge(36)|center_crop(size)",
            "mean": [120.0, 110.0, 100.0],
            "std": [60.0, 55.0, 50.0],
        },
        "training": {"dropout": 0.2, "bn_momentum": 0.9, "folded_norm": False, "quantize": "none"},
        "classes": ["cat", "dog", "eel", "fox", "gnu", "hen"],
        "origin": {"kind": "made by a test"},
    }


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

    tiny_model.write(path, seed=1)  # the remains of the failure do not stand in the way
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
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(path, tiny_model.variables(seed=1), origin={"kind": object()})
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


@pytest.mark.parametrize("number", [0, 3, "1", None])
def test_another_format_is_refused(broken, number):
    edit(broken, lambda info: info.update(format=number))
    assert f"has format {number!r}; this version reads 1 and 2" in refusal(broken)


@pytest.mark.parametrize("task", ["clasification", "no.module:Class", 7, None])
def test_an_unknown_task_is_refused(broken, task):
    edit(broken, lambda info: info.update(task=task))
    message = refusal(broken)
    assert repr(task) in message
    if task == "clasification":
        assert "did you mean 'classification'?" in message


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("backbone", "width"),
        ("backbone", "padding"),
        ("head", "num_classes"),
        ("preprocessing", "mean"),
        ("preprocessing", None),
        ("training", "bn_momentum"),
        ("classes", None),
    ],
)
def test_model_json_that_lacks_something_is_refused_by_name(broken, section, key):
    edit(broken, lambda info: info[section].pop(key) if key else info.pop(section))
    missing = f"{section}.{key}" if key else section
    assert f"{missing} is missing" in refusal(broken)


def test_model_json_written_before_some_fields_existed_is_read(broken):
    def older(info):
        for key in ("output_stride", "depth", "fixed_ends", "last_convolution"):
            del info["backbone"][key]
        del info["head"]["hidden"], info["training"]["folded_norm"], info["training"]["quantize"]

    edit(broken, older)
    assert model_dir.read(broken).spec == tiny_model.SPEC


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("backbone", "depth", 0, "backbone.depth is 0: it must be above 0"),
        ("backbone", "fixed_ends", 1, "backbone.fixed_ends is 1: it must be True or False"),
        ("head", "hidden", [0], "head.hidden is [0]: it must be whole numbers, 1 or more"),
        ("training", "folded_norm", "yes", "training.folded_norm is 'yes': it must be True or"),
        ("backbone", "padding", "valid", "backbone.padding is 'valid': known are 'torch', 'same'"),
        ("backbone", "strides", [1, 2], "backbone.strides is [1, 2]: it must be 8 numbers"),
        ("backbone", "width", "one", "backbone.width is 'one': it must be above 0"),
        ("backbone", "width", float("nan"), "backbone.width is nan"),
        ("backbone", "output_stride", 4, "backbone.output_stride is 4: known are '8', '16', '32'"),
        ("preprocessing", "std", [1, 0, 1], "preprocessing.std is [1, 0, 1]"),
        ("preprocessing", "mean", "abc", "preprocessing.mean is 'abc'"),
        ("preprocessing", "eval_transforms", 3, "preprocessing.eval_transforms is 3"),
        ("training", "dropout", 1.5, "training.dropout is 1.5: it must be 0 or more, at most 1"),
        ("head", "num_classes", 5, "classes are 6, head.num_classes is 5"),
        ("head", "num_classes", None, "classes are 6, head.num_classes is None"),
        ("backbone", "name", "mobilenet_v3", "backbone.name is not 'mobilenet_v2'"),
    ],
)
def test_model_json_with_an_impossible_value_is_refused(broken, section, key, value, named):
    edit(broken, lambda info: info[section].update({key: value}))
    assert named in refusal(broken)


def test_all_faults_of_model_json_are_listed(broken):
    def damage(info: dict[str, Any]) -> None:
        info["backbone"] |= {"width": -1, "padding": "valid"}
        del info["preprocessing"]["std"], info["classes"]

    edit(broken, damage)
    message = refusal(broken)
    for part in ("backbone.width", "backbone.padding", "preprocessing.std is missing", "classes"):
        assert part in message


def test_arrays_of_another_shape_are_refused_by_name(tmp_path):
    variables = tiny_model.variables()
    variables["params"]["classifier"]["kernel"] = np.zeros((1280, 7), np.float32)
    variables["batch_stats"]["stem"]["norm"]["mean"] = np.zeros(16, np.float32)
    message = refusal(write(tmp_path / "model", variables))
    assert "params/classifier/kernel is (1280, 7), not (1280, 6)" in message
    assert "batch_stats/stem/norm/mean is (16,), not (8,)" in message


def test_missing_and_superfluous_arrays_are_refused_by_name(tmp_path):
    variables = tiny_model.variables()
    del variables["params"]["last"]["norm"]["bias"]
    variables["params"]["layer8_0"] = {"scale": np.ones(3, np.float32)}
    message = refusal(write(tmp_path / "model", variables))
    assert "params/last/norm/bias is missing" in message
    assert "params/layer8_0/scale is not of this network" in message


def test_a_missing_collection_is_refused_by_name(tmp_path):
    path = write(tmp_path / "model", tiny_model.variables() | {"batch_stats": {}})
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
    # The arrays are compressed without a checksum: some flips raise, others change numbers.
    file = max((broken / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0x10
    file.write_bytes(content)
    assert "SHA-256" in refusal(broken)


# The tiny model's file of format 1.
FORMAT_1: dict[str, Any] = {
    "format": 1,
    "task": "classification",
    "architecture": {
        "name": "mobilenet_v2",
        "width": 0.1,
        "strides": [2, 1, 2, 2, 2, 1, 2, 1],
        "num_classes": 6,
    },
    "conventions": {"dropout": 0.2, "padding": "torch", "bn_epsilon": 1e-5, "bn_momentum": 0.9},
    "preprocessing": {
        "image_size": 32,
        "eval_transforms": "resize_edge(36)|center_crop(size)",
        "mean": [120.0, 110.0, 100.0],
        "std": [60.0, 55.0, 50.0],
    },
    "class_names": ["cat", "dog", "eel", "fox", "gnu", "hen"],
    "origin": {"kind": "made by a test"},
}


def test_a_part_of_an_array_that_is_missing_is_not_read_as_zeros(broken):
    """An old model has no hash by which its absence would be noticed before."""
    edit(broken, lambda info: info.pop("arrays_sha256"))
    base = {"driver": "file", "path": f"{broken}/arrays/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store.write("params.stem.conv.kernel/0.0.0.0", None).result()  # deletes it
    with pytest.raises(UserError, match=r"broken/arrays cannot be read: .*params.stem.conv.kernel"):
        model_dir.read(broken)


def test_model_json_of_format_1_is_read(broken):
    sha256 = json.loads((broken / "model.json").read_text())["arrays_sha256"]
    (broken / "model.json").write_text(json.dumps(FORMAT_1 | {"arrays_sha256": sha256}))
    saved = model_dir.read(broken)
    assert_holds(saved, tiny_model.variables())
    assert saved.description == tiny_model.DESCRIPTION


def test_model_json_of_format_1_without_hash_and_dropout_is_read(broken):
    old = json.loads(json.dumps(FORMAT_1))
    del old["conventions"]["dropout"]
    (broken / "model.json").write_text(json.dumps(old))
    saved = model_dir.read(broken)
    assert_holds(saved, tiny_model.variables())
    assert saved.spec == tiny_model.SPEC.replace({"model.dropout": 0.0})


def test_features_and_published_figures_of_format_1_are_read(tmp_path):
    variables = tiny_model.variables()
    del variables["params"]["classifier"]
    path = write(tmp_path / "m", variables)
    card = {"top1": 1.0, "top5": 2.0, "examples": 3, "source": "somebody"}
    architecture = FORMAT_1["architecture"] | {"num_classes": None}
    old = FORMAT_1 | {"architecture": architecture, "class_names": [], "published": card}
    (path / "model.json").write_text(json.dumps(old))
    saved = model_dir.read(path)
    assert saved.features_only
    assert saved.classes == ()
    assert saved.description.published == card
    assert_holds(saved, variables)


@pytest.mark.parametrize(
    ("section", "key", "named"),
    [
        ("architecture", "width", "backbone.width is missing"),
        ("architecture", "num_classes", "head.num_classes is missing"),
        ("conventions", "padding", "backbone.padding is missing"),
        ("conventions", None, "training.bn_momentum is missing"),
        ("preprocessing", None, "preprocessing is missing"),
        ("class_names", None, "classes is missing"),
    ],
)
def test_faults_of_format_1_are_named(broken, section, key, named):
    old = json.loads(json.dumps(FORMAT_1))
    if key:
        del old[section][key]
    else:
        del old[section]
    (broken / "model.json").write_text(json.dumps(old))
    assert named in refusal(broken)


@pytest.mark.parametrize("card", [{}, {"top1": 1}, "71.86", {"top1": 1, "top5": 2, "examples": 3}])
def test_published_figures_of_another_form_are_refused(broken, card):
    edit(broken, lambda info: info.update(published=card))
    assert "published is not" in refusal(broken)


def test_class_names_that_would_steer_a_terminal_are_refused(broken):
    edit(broken, lambda info: info["classes"].__setitem__(0, "\x1b[31mcat"))
    assert "classes are not all printable" in refusal(broken)


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
    spec = dataclasses.replace(tiny_model.SPEC, head=None)
    saved = model_dir.read(write(tmp_path / "m", variables, spec=spec, classes=()))
    assert saved.features_only
    assert saved.classes == ()
    assert_holds(saved, variables)


def state(step: int, *, with_ema: bool) -> TrainState:
    """Returns a training state: weights of seed `step`, an average of seed 100 + `step`."""
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
    """Returns a workdir with checkpoints of these steps."""
    with Checkpoints(workdir, Checkpoint(best_metric="loss")) as checkpoints:
        for step in steps:
            description = dataclasses.replace(tiny_model.DESCRIPTION, origin={"step": step})
            checkpoints.save(state(step, with_ema=with_ema), {}, description, metrics=None)
    return workdir


@pytest.mark.parametrize("with_ema", [False, True])
def test_workdir_with_checkpoints_is_its_newest_and_its_average_if_there_is_one(
    tmp_path, caplog, with_ema
):
    workdir = train(tmp_path, [9, 10], with_ema=with_ema)  # as text, 9 sorts after 10
    caplog.clear()
    saved = model_dir.read(workdir)
    assert not caplog.messages  # a user would see them
    assert_holds(saved, tiny_model.variables(110 if with_ema else 10))
    assert saved.classes == tiny_model.CLASSES
    assert saved.description.origin == {"step": 10}


def test_finished_workdir_is_its_model_until_the_run_goes_on(tmp_path):
    workdir = train(tmp_path, [10])
    arrays = tiny_model.variables(5)
    write(workdir / "model", arrays, origin={"step": 10})
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
