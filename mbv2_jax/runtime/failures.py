"""The end of a run of several processes when one of them fails.

JAX ends every process when one is lost, with an abort and a stack trace. This module adds a
message: what happened, where, and what to do. A process that fails with an error of its own writes
a message to the key-value store, and the others end with it at once, before its heartbeats stop.
"""

import contextlib
import os
import re
import sys
import threading
import time
from typing import NoReturn

import jax

from mbv2_jax.errors import RunFailed, UserError, first_line, report
from mbv2_jax.runtime import coordinator
from mbv2_jax.runtime.last_words import LastWords

_POLL = 1.0  # seconds between two looks at whether another process failed
_GRACE = 3.0  # seconds for this process's own error, or for another one's message, to arrive
# Seconds that process 0 stays after a failure was reported, so that the others, which read the
# message from it, can end by themselves: JAX aborts a process that loses process 0.
_LINGER = _GRACE + 2 * _POLL
_KEY = "mbv2_jax/failed"  # where a process that fails writes its message

# The words of JAX's errors, and of the libraries that carry its sums, when another process is gone.
# An error of this process itself (no memory left, ...) has other words.
_CONNECTION_LOST = re.compile(
    "UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|gloo|nccl|connection|barrier|heartbeat", re.I
)

# How to continue a run, whichever way it ended.
RESUME_HINT = (
    "What was saved is complete: give the same command again on every host to go on from the "
    "newest checkpoint"
)


class FailureWatch:
    """A thread that ends this process when another one has reported that it failed."""

    def __init__(self, last_words: LastWords):
        self._last_words, self._closed = last_words, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL):
            message = _reported_failure()
            if message is None:
                continue
            # JAX may abort this process during the grace period.
            self._last_words.set(_final_message(message))
            # This process may be ending by an error of its own, perhaps the same one.
            if not self._closed.wait(_GRACE):
                _end_with(message, self._last_words, linger=2 * _POLL)


def end_process(
    error: BaseException, last_words: LastWords, watch: FailureWatch | None
) -> NoReturn:
    """Reports an error to the user and to the other processes, and ends this process.

    The interpreter's own exit would wait for the others at JAX's shutdown, and then abort.

    Args:
      error: the exception that left the run.
      last_words: the message for the case that JAX aborts this process meanwhile.
      watch: the watch for other processes' failures; None before the processes have met.
    """
    from_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if watch is not None:
        watch.close()
        if from_jax and (message := _reported_failure(within=_GRACE)):
            _end_with(
                message, last_words, linger=_LINGER
            )  # the end of another one caused the error
    if from_jax and _CONNECTION_LOST.search(str(error)):
        error = RunFailed(
            f"{coordinator.describe_process()}: the processes' common computation broke off, "
            f"perhaps because one of them died: {first_line(error)}. {RESUME_HINT}"
        )
    status = _exit_status(error)
    _tell_others(error, status, last_words)
    last_words.set("")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_status(error: BaseException) -> int:
    """Reports an error to the user; returns the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return report(error)


def _tell_others(error: BaseException, status: int, last_words: LastWords) -> None:
    """Writes an error to the key-value store, unless this process ends without one."""
    if status == 0 and not isinstance(error, BrokenPipeError):
        last_words.set("")
        return
    # JAX may abort this process before it has told the others.
    last_words.set(f"failed: {_message(error)}")
    if not jax.distributed.is_initialized():
        return
    with contextlib.suppress(Exception):  # the service may be gone already
        text = f"{coordinator.describe_process()}: {_message(error)}"
        coordinator.client().key_value_set(_KEY, text)
    if coordinator.is_first():
        time.sleep(_LINGER)


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    kind = "" if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"


def _reported_failure(within: float = 0.0) -> str | None:
    """Returns the message of a process that failed; None where there is none.

    Args:
      within: seconds to wait for one.
    """
    end = time.monotonic() + within
    while True:
        # It raises where the key is missing, or the service gone; JAX ends this process for that.
        with contextlib.suppress(Exception):
            return coordinator.client().key_value_try_get(_KEY)
        if time.monotonic() >= end:
            return None
        time.sleep(_POLL / 4)


def _final_message(message: str) -> str:
    """Returns the lines with which this process ends because of another one's failure."""
    return f"failed: {message}\n{coordinator.describe_process()} ends with it. {RESUME_HINT}"


def _end_with(message: str, last_words: LastWords, linger: float) -> NoReturn:
    """Ends this process because another one failed; process 0 after `linger` seconds."""
    print(_final_message(message), file=sys.stderr, flush=True)
    last_words.set(_final_message(message))  # JAX may abort this process before its end
    if coordinator.is_first():
        time.sleep(linger)
    last_words.set("")
    os._exit(1)
