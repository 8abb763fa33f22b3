"""Conversion of one file in a process of its own, with its time and memory bounded."""

import os
import pathlib
import resource
import signal
import warnings
from typing import NamedTuple

from mbv2_jax.convert import importer
from mbv2_jax.errors import UserError

SECONDS = 10  # that a conversion may take
RATIO, PLAIN = 5, 300 << 20  # bytes that it may take: 5 times the file's and 300 MB

CONVERTED, REFUSED, CRASHED, HUNG, TOO_LARGE = OUTCOMES = (
    "converted",
    "refused",
    "crashed",
    "hung",
    "too large",
)
_CODES = {CONVERTED: 0, REFUSED: 10}


class Outcome(NamedTuple):
    """The end of a conversion.

    Attributes:
      name: one of OUTCOMES.
      seconds: that it took.
      memory: bytes that it took beyond those of this process.
      line: the line of a refusal, or of the error that a crash began with.
    """

    name: str
    seconds: float
    memory: int
    line: str


def convert(path: pathlib.Path) -> Outcome:
    """Converts a file in a forked process, which has imported everything already."""
    before = _resident()
    reading, writing = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # of forking with threads, which all sleep
        child = os.fork()
    if not child:
        os.close(reading)
        _run(path, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        line = pipe.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(child, 0)
    memory = max(usage.ru_maxrss * 1024 - before, 0)
    seconds = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    name = next((name for name, known in _CODES.items() if known == code), CRASHED)
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        name = HUNG
    elif memory > RATIO * path.stat().st_size + PLAIN:
        name = TOO_LARGE
    return Outcome(name, seconds, memory, line)


def _run(path: pathlib.Path, pipe: int) -> None:
    """Converts a file, and ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # The clock of the processor, since the machine may be busy; the other one for what sleeps.
    # At the second limit the signal would be that of a crash.
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(6 * SECONDS)
    _limit_memory()
    code, line = _CODES[CONVERTED], ""
    try:
        importer.load(path)
    except UserError as error:
        code, line = _CODES[REFUSED], str(error)
        if not line.isprintable() or str(path) not in line:
            code, line = 1, f"a refusal that names no file, or is no line: {line}"
    except BaseException as error:
        code, line = 1, f"{type(error).__name__}: {error}"
    os.write(pipe, line.encode("utf-8", "replace")[:4_000])
    os._exit(code)


def _limit_memory() -> None:
    """Makes an allocation of many GB a MemoryError, before the machine runs out."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _resident() -> int:
    """Returns the bytes of this process that are in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
