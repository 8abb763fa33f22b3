"""A message that is printed when this process is killed or aborted."""

import contextlib
import subprocess
import sys

_PROGRAM = (
    "import signal, sys\n"
    # A cluster may send SIGTERM to every process of a job.
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "sys.stderr.write([*sys.stdin, ''][-2:][0].lstrip())"
)


class LastWords:
    """A line on standard error for the case that this process dies without a message of its own.

    A small child process waits for the end of its standard input, and prints the last line that it
    read. A signal handler of Python would not do: none runs when C++ code aborts the process.
    """

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-IS", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # signals to the process group do not reach it
        )

    def set(self, text: str) -> None:
        """Replaces the line to print; "" prints nothing."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(" ".join(text.split()) + "\n")
            self._child.stdin.flush()
