"""Which steps of a run are traced, and the messages about those that are not."""

import jax
import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.runtime import profiler


@pytest.mark.parametrize("spec", ["5", "9:3", "0:3", "3:", "3-4", "a:b", "-1:4"])
def test_a_profile_that_is_no_two_steps_is_refused(spec):
    with pytest.raises(UserError, match=r"profile is .*: it must be FIRST:LAST, two steps"):
        profiler.parse(spec)


@pytest.mark.parametrize(
    ("spec", "said", "traced"),
    [
        ("8:9", "profile=8:9: the run ends before these steps (it does 3 to 6)", ()),
        ("1:2", "profile=1:2: the run starts after these steps (it does 3 to 6)", ()),
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
    tracer = profiler.StepTrace(
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
    tracer = profiler.StepTrace(
        "3:6", tmp_path, start=2, stop=6, wait=lambda: None, say=print, say_everywhere=print
    )
    with tracer as steps:
        for step, _ in steps.around(enumerate("abcd", start=3)):
            if step == 4:
                break
        assert running
    assert not running
