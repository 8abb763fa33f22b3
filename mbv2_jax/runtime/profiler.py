"""The profiler's trace of the training steps that config.profile names."""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.storage import bucket

T = TypeVar("T")


def parse(spec: str | None) -> tuple[int, int] | None:
    """Returns the first and the last step of "FIRST:LAST"; None for None or "".

    Raises:
      UserError: `spec` does not name two steps, counted from 1, in this order.
    """
    if not spec:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"profile is {spec!r}: it must be FIRST:LAST, two steps counted from 1, such as 20:24"
        )
    return int(match[1]), int(match[2])


class StepTrace:
    """A context manager that traces some steps of a run; every process writes its own trace.

    Args:
      spec: config.profile.
      workdir: the folder in which `profile/` is written.
      start: the number of steps that are done already.
      stop: the last step of the run.
      wait: returns when the devices have finished all steps so far.
      say: prints a line, once for the run.
      say_everywhere: prints a line in this process.
    """

    def __init__(
        self,
        spec: str | None,
        workdir: pathlib.Path,
        *,
        start: int,
        stop: int,
        wait: Callable[[], None],
        say: Callable[[str], None],
        say_everywhere: Callable[[str], None],
    ):
        self._wait, self._say, self._say_everywhere = wait, say, say_everywhere
        self._first, self._last = self._clip(spec, start, stop)
        self._folder: str | None = None  # where the profiler writes, while it runs
        # As the viewers expect it: a folder for each trace, with files of each process.
        name = f"steps_{self._first}-{self._last}"
        self._root = workdir / "profile"
        self._target = self._root / "plugins" / "profile" / name

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:  # the run stops early: keep the trace so far
            self._write()

    def around(self, steps: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        """Yields steps and their batches, tracing from the first requested step to the last.

        Args:
          steps: the number of each step with its batch.
        """
        for step, batch in steps:
            if step == self._first:
                self._start()
            if self._folder is None:
                yield step, batch
                continue
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step, batch
            if step == self._last:
                self._wait()
                self._write()

    def _clip(self, spec: str | None, start: int, stop: int) -> tuple[int, int]:
        """Returns the requested steps that the run does; (0, 0) for none. Reports a difference."""
        requested = parse(spec)
        if requested is None:
            return 0, 0
        first, last = requested
        if first > stop or last <= start:
            why = "ends before" if first > stop else "starts after"
            self._say(f"profile={spec}: the run {why} these steps (it does {start + 1} to {stop})")
            return 0, 0
        clipped = max(first, start + 1), min(last, stop)
        if clipped != requested:
            self._say(f"profile={spec}: of these steps the run does {clipped[0]} to {clipped[1]}")
        return clipped

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="mbv2_jax-")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing each call of a function would slow the steps
        jax.profiler.start_trace(self._folder, profiler_options=options)

    def _write(self) -> None:
        """Ends the trace and moves its files to the workdir; a failure is only reported."""
        assert self._folder is not None
        folder, self._folder = pathlib.Path(self._folder), None
        try:
            jax.profiler.stop_trace()
            with bucket.as_oserror(self._target):
                self._copy_from(folder)
        except (OSError, RuntimeError) as error:
            self._say_everywhere(
                f"process {jax.process_index()}: its trace cannot be written to {self._target}: "
                f"{first_line(error)}"
            )
            return
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
        root = os.fspath(self._root)
        download = f"gcloud storage cp -r {root} . && " if bucket.is_address(root) else ""
        self._say(
            f"trace of steps {self._first} to {self._last}: {self._target}. To view it: pip "
            f"install xprof, then {download}xprof --logdir={'profile' if download else root}; or "
            "open its .trace.json.gz in https://ui.perfetto.dev"
        )

    def _copy_from(self, folder: pathlib.Path) -> None:
        # Several processes of a machine would all write HOST.xplane.pb.
        host = socket.gethostname()
        self._target.mkdir(parents=True, exist_ok=True)
        for file in folder.rglob(f"{host}.*"):
            name = f"{host}_{jax.process_index()}{file.name.removeprefix(host)}"
            (self._target / name).write_bytes(file.read_bytes())
