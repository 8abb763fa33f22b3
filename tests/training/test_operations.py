"""What keeps a cluster's owner happy: compiled programs are kept, and chosen steps are traced."""

import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import compilation_cache, mesh, processes, profiler
from tests.support import commands

SIX_STEPS = ("--config.num_epochs=0.2", "--config.log.every_steps=1")
HIT = "Persistent compilation cache hit for"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A user's cache folder."""
    return tmp_path_factory.mktemp("home")


def run(home, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Without a cache that the environment names, as a user would start it."""
    return commands.run(None, *arguments, *SIX_STEPS, env={"XDG_CACHE_HOME": str(home)} | env)


@pytest.fixture(scope="module")
def fresh(tiny, home, tmp_path_factory) -> pathlib.Path:
    """A run that had nothing compiled before it."""
    workdir = tmp_path_factory.mktemp("fresh") / "run"
    status, _, err = run(home, *tiny(workdir))
    assert status == 0, err
    assert "arning" not in err, err
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


@pytest.mark.parametrize("spec", ["5", "9:3", "0:3", "3:", "3-4", "a:b", "-1:4"])
def test_a_profile_that_is_no_two_steps_is_refused(spec):
    with pytest.raises(UserError, match=r"profile is .*: it must be FIRST:LAST, two steps"):
        profiler.parse(spec)


@pytest.mark.parametrize(
    ("spec", "said", "traced"),
    [
        ("8:9", "profile=8:9: the run ends before these steps (it is of 3 to 6)", ()),
        ("1:2", "profile=1:2: the run goes on after these steps (it is of 3 to 6)", ()),
        ("2:4", "profile=2:4: of these steps the run does 3 to 4", (3, 4)),
        ("6:9", "profile=6:9: of these steps the run does 6 to 6", (6,)),
        ("4:5", None, (4, 5)),
    ],
)
def test_steps_that_the_run_does_not_do_are_said(monkeypatch, tmp_path, spec, said, traced):
    running: list[str] = []
    lines: list[str] = []
    seen: list[int] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    tracer = profiler.Trace(
        spec, tmp_path, start=2, stop=6, wait=lambda: None, say=lines.append, say_everywhere=print
    )
    with tracer as steps:
        for step, _ in steps.around(enumerate("abcd", start=3)):
            seen += [step] if running else []
    assert tuple(seen) == traced
    assert not running
    about_traces = [line for line in lines if line.startswith("trace of steps")]
    assert len(about_traces) == bool(traced)
    assert [line for line in lines if line not in about_traces] == ([said] if said else [])


def test_a_trace_ends_with_a_run_that_is_stopped_in_it(monkeypatch, tmp_path):
    running: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    tracer = profiler.Trace(
        "3:6", tmp_path, start=2, stop=6, wait=lambda: None, say=print, say_everywhere=print
    )
    with tracer as steps:
        for step, _ in steps.around(enumerate("abcd", start=3)):
            if step == 4:
                break
        assert running
    assert not running


def enable(setting: str | None) -> None:
    compilation_cache.enable(setting, default.get_config().distributed)


@pytest.fixture
def jax_folder(monkeypatch) -> Iterator[Callable[[], str | None]]:
    """Reads jax's setting, which is put back in the end."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    name = "jax_compilation_cache_dir"
    before = {key: getattr(jax.config, key) for key in (name, "jax_enable_compilation_cache")}
    yield lambda: getattr(jax.config, name)
    for key, value in before.items():
        jax.config.update(key, value)


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(jax_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    enable(str(tmp_path / "file" / "cache"))
    assert "cannot be written: Not a directory; everything is compiled" in capsys.readouterr().err
    assert jax_folder() is None


def test_several_processes_on_cpus_keep_nothing(jax_folder, tmp_path, monkeypatch):
    """Else the first alone would find what it compiled, and lose the others, which compile."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    enable(str(tmp_path / "cache"))
    assert jax_folder() is None
    assert not jax.config.values["jax_enable_compilation_cache"]  # not what a variable names either


@pytest.mark.parametrize("sees", [True, False])
def test_several_processes_keep_what_all_can_read(jax_folder, tmp_path, monkeypatch, capsys, sees):
    """On GPUs one that compiles what the other one found would wait for it for ever."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(mesh, "on_cpu", lambda: False)
    # The second process, on a host with the same disk or with one of its own.
    monkeypatch.setattr(
        processes,
        "exchange",
        lambda name, value, timeouts: [value, sees if name.startswith("view") else value],
    )
    enable(str(tmp_path / "cache"))
    assert jax.config.values["jax_enable_compilation_cache"] == sees
    assert jax_folder() == (str(tmp_path / "cache") if sees else None)
    said = f"is not kept: {tmp_path / 'cache'} is not on a disk that all hosts share"
    assert (said in capsys.readouterr().err) != sees
    assert not list((tmp_path / "cache").iterdir())


def test_several_processes_make_the_folder_that_the_environment_names(
    jax_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(mesh, "on_cpu", lambda: False)
    monkeypatch.setattr(processes, "exchange", lambda name, value, timeouts: [value, value])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    enable(None)
    assert (tmp_path / "theirs").is_dir()
    assert jax.config.values["jax_enable_compilation_cache"]


def test_where_the_cache_is(jax_folder, tmp_path, monkeypatch):
    enable("")
    assert jax_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    enable(None)
    assert pathlib.Path(jax_folder()).parent == tmp_path / "home" / "mbv2_jax" / "compiled"
    enable(str(tmp_path / "mine"))
    assert jax_folder() == str(tmp_path / "mine")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    enable(str(tmp_path / "other"))
    assert jax_folder() == str(tmp_path / "mine")  # jax itself has read the variable
