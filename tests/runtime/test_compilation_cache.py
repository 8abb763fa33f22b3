"""Compiled programs are kept between runs, where every process can read them."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

import mbv2_jax
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import compilation_cache, mesh
from mbv2_jax.runtime.processes import Group
from tests.support import REPOSITORY, commands, tiny_model

SIX_STEPS = ("--config.num_epochs=0.2", "--config.log.every_steps=1")
HIT = "Persistent compilation cache hit for"
FOLDER, MINIMUM = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"

# Predicts without the cache and then with it; prints which settings each of them changed, and how
# many programs were found.
PREDICT = """
import json, os, sys
import jax
import numpy as np

def changed():
    after = dict(jax.config.values), dict(os.environ)
    return [sorted(k for k in a | b if a.get(k) != b.get(k)) for a, b in zip(before, after)]

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
before = dict(jax.config.values), dict(os.environ)
import mbv2_jax
predictor = mbv2_jax.init_model(sys.argv[1])
mbv2_jax.inference_model(predictor, np.zeros((40, 40, 3), np.uint8))
unasked = changed()
mbv2_jax.enable_compilation_cache()
asked = changed()
mbv2_jax.inference_model(predictor, [np.zeros((40, 40, 3), np.uint8)] * 2)
print(json.dumps([unasked, asked, found.count("/jax/compilation_cache/cache_hits")]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A user's cache folder."""
    return tmp_path_factory.mktemp("home")


def run(home, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Runs without a cache that the environment names, as a user would start it.

    By default jax keeps what took a second to compile, which depends on the machine's load; here
    it keeps all.
    """
    env = {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | env
    return commands.run(None, *arguments, *SIX_STEPS, env=env)


@pytest.fixture(scope="module")
def fresh(tiny, home, tmp_path_factory) -> pathlib.Path:
    """A run that had nothing compiled before it."""
    workdir = tmp_path_factory.mktemp("fresh") / "run"
    status, _, err = run(home, *tiny(workdir))
    assert status == 0, err
    assert not re.search(r"\b[Ww]arning", err), err
    return workdir


@pytest.mark.slow
def test_what_was_compiled_is_kept_and_gives_the_same_bits(fresh, tiny, home, tmp_path):
    (folder,) = (home / "mbv2_jax" / "compiled").iterdir()
    kept = {file.name for file in folder.glob("*-cache")}
    assert any(name.startswith("jit_train_step") for name in kept)
    debug = {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    status, _, err = run(home, *tiny(tmp_path / "run"), **debug)
    assert status == 0, err
    assert f"{HIT} 'jit_train_step'" in err
    assert {file.name for file in folder.glob("*-cache")} == kept
    assert commands.metrics(tmp_path / "run") == commands.metrics(fresh)
    ours, theirs = (commands.arrays(run / "model/arrays") for run in (tmp_path / "run", fresh))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@dataclasses.dataclass(frozen=True)
class FirstOfTwo(Group):
    """Process 0 of two; process 1 gives the same values, but a view of its own of a folder."""

    index: int = 0
    count: int = 2
    other_sees: bool = True

    def exchange(self, name: str, value: Any) -> list[Any]:
        return [value, self.other_sees if name.startswith("view") else value]


@pytest.fixture
def jax_folder(monkeypatch) -> Iterator[Callable[[], str | None]]:
    """Reads jax's setting: unset at first, whatever ran before, and put back in the end."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = (FOLDER, MINIMUM, "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(FOLDER, None)
    yield lambda: getattr(jax.config, FOLDER)
    for key, value in before.items():
        jax.config.update(key, value)


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(jax_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    compilation_cache.enable(str(tmp_path / "file" / "cache"))
    assert "cannot be written: Not a directory; everything is compiled" in capsys.readouterr().err
    assert jax_folder() is None


def test_an_unsupported_address_is_refused_before_a_folder_is_made(
    jax_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3://bucket/cache.*gs://BUCKET/FOLDER"):
        compilation_cache.enable("s3://bucket/cache")
    assert jax_folder() is None
    assert not list(tmp_path.iterdir())


def test_several_processes_on_cpus_keep_nothing(jax_folder, tmp_path):
    """Else the first alone would find what it compiled, and lose the others, which compile."""
    compilation_cache.enable(str(tmp_path / "cache"), FirstOfTwo())
    assert jax_folder() is None
    assert not jax.config.values["jax_enable_compilation_cache"]  # not what a variable names either


@pytest.mark.parametrize("sees", [True, False])
def test_several_processes_keep_what_all_can_read(jax_folder, tmp_path, monkeypatch, capsys, sees):
    """On GPUs a process that compiles would wait for ever for one that found the program."""
    monkeypatch.setattr(mesh, "on_cpu", lambda: False)
    compilation_cache.enable(str(tmp_path / "cache"), FirstOfTwo(other_sees=sees))
    assert jax.config.values["jax_enable_compilation_cache"] == sees
    assert jax_folder() == (str(tmp_path / "cache") if sees else None)
    said = f"are not kept: {tmp_path / 'cache'} is not on a disk that all hosts share"
    assert (said in capsys.readouterr().err) != sees
    assert not list((tmp_path / "cache").iterdir())


def test_several_processes_make_the_folder_that_the_environment_names(
    jax_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(mesh, "on_cpu", lambda: False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    compilation_cache.enable(None, FirstOfTwo())
    assert (tmp_path / "theirs").is_dir()
    assert jax.config.values["jax_enable_compilation_cache"]


def test_where_the_cache_is(jax_folder, tmp_path, monkeypatch):
    compilation_cache.enable("")
    assert jax_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    compilation_cache.enable(None)
    assert pathlib.Path(jax_folder()).parent == tmp_path / "home" / "mbv2_jax" / "compiled"
    compilation_cache.enable(str(tmp_path / "mine"))
    assert jax_folder() == str(tmp_path / "mine")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    compilation_cache.enable(str(tmp_path / "other"))
    assert jax_folder() == str(tmp_path / "mine")  # jax itself has read the variable


@pytest.mark.slow
def test_python_users_get_the_cache_with_one_call_and_no_setting_changes_before(tmp_path):
    """A later process finds what the first one compiled, however little time that took."""
    model = tiny_model.write(tmp_path / "model")
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": commands.QUICKLY}
    for kept in (0, 1):  # the network with its probabilities
        command = [sys.executable, "-c", PREDICT, str(model)]
        outcome = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr
        unasked, asked, found = json.loads(outcome.stdout)
        assert unasked == [[], []]
        assert asked == [[FOLDER, MINIMUM], []]
        assert found == kept


def test_a_cache_that_the_user_has_set_stays_as_it_is(jax_folder, tmp_path):
    jax.config.update(FOLDER, str(tmp_path / "theirs"))
    before = dict(jax.config.values)
    mbv2_jax.enable_compilation_cache()
    assert dict(jax.config.values) == before
    mbv2_jax.enable_compilation_cache(tmp_path / "named")
    assert jax_folder() == str(tmp_path / "named")


def test_the_least_time_that_the_user_has_set_stays(jax_folder, tmp_path):
    jax.config.update(MINIMUM, 5.0)
    mbv2_jax.enable_compilation_cache(tmp_path)
    assert jax.config.values[MINIMUM] == 5.0


def test_another_folder_is_used_from_then_on(jax_folder, tmp_path):
    """JAX itself would go on with the folder that it opened first."""
    for name, factor in (("first", 3), ("second", 5)):
        mbv2_jax.enable_compilation_cache(tmp_path / name)
        jax.jit(lambda x, factor=factor: x * factor)(np.ones(7))
        assert list((tmp_path / name).glob("*-cache"))
