"""--config.profile: a trace of some steps, of what the devices and the hosts did when."""

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
    """Returns the first and the last step of "FIRST:LAST"; None where nothing is to be traced.

    Raises:
      UserError: it is not two steps, the first from 1 on and not after the last.
    """
    if not spec:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"profile is {spec!r}: it must be FIRST:LAST, two steps counted from 1, such as 20:24"
        )
    return int(match[1]), int(match[2])


class Trace:
    """The trace of some steps of a run. A context manager; every process has its own.

    Args:
      spec: config.profile.
      workdir: where `profile/` is.
      start: the step to go on from.
      stop: the last step of the run.
      wait: returns when the devices are done with all the steps so far.
      say: prints a line, once for the run.
      say_everywhere: prints a line of this process.
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
        self._first, self._last = wanted = parse(spec) or (0, 0)
        self._folder: str | None = None  # where the profiler writes, while it runs
        if self._first > stop or 0 < self._last <= start:
            why = "ends before" if self._first > stop else "goes on after"
            say(f"profile={spec}: the run {why} these steps (it is of {start + 1} to {stop})")
            self._first = self._last = 0
        elif spec:
            self._first, self._last = max(self._first, start + 1), min(self._last, stop)
            if (self._first, self._last) != wanted:
                say(f"profile={spec}: of these steps the run does {self._first} to {self._last}")
        # As the viewers want it: a folder for each trace, in it the files of each process.
        name = f"steps_{self._first}-{self._last}"
        self._root = workdir / "profile"
        self._target = self._root / "plugins" / "profile" / name

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:  # the run stops early: what was traced so far is kept
            self._write()

    def around(self, steps: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        """Yields steps and their batches; traces from where the first is yielded to the last's end.

        Args:
          steps: each with its number.
        """
        for step, batch in steps:
            if step == self._first:
                self._folder = tempfile.mkdtemp(prefix="mbv2_jax-")
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # each call of a function: slows what is measured
                jax.profiler.start_trace(self._folder, profiler_options=options)
            if self._folder is None:
                yield step, batch
                continue
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step, batch
            if step == self._last:
                self._wait()
                self._write()

    def _write(self) -> None:
        """Ends the trace, and moves its files to the workdir; says what hinders that."""
        assert self._folder is not None
        folder, self._folder = pathlib.Path(self._folder), None
        # Several processes of a machine would all write HOST.xplane.pb.
        name = f"{socket.gethostname()}_{jax.process_index()}"
        try:
            jax.profiler.stop_trace()
            with bucket.as_oserror(self._target):
                self._target.mkdir(parents=True, exist_ok=True)
                for file in folder.rglob(f"{socket.gethostname()}.*"):
                    ending = file.name.removeprefix(socket.gethostname())
                    (self._target / (name + ending)).write_bytes(file.read_bytes())
        except (OSError, RuntimeError) as error:  # training goes on
            self._say_everywhere(
                f"process {jax.process_index()}: its trace cannot be written to {self._target}: "
                f"{first_line(error)}"
            )
            return
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
        root = os.fspath(self._root)
        here = f"gcloud storage cp -r {root} . && " if bucket.is_address(root) else ""
        self._say(
            f"trace of steps {self._first} to {self._last}: {self._target}. To look at it: pip "
            f"install xprof, then {here}xprof --logdir={'profile' if here else root}; or open its "
            ".trace.json.gz in https://ui.perfetto.dev"
        )
