"""Errors that a command reports in one line, and the words for them."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake; the message names the fault, its place, and the remedy.

    The commands print it without a traceback and exit with status 2.
    """


class UnreadableImage(UserError):
    """An image, or its record, that cannot be read or decoded."""


class RunFailed(Exception):
    """A run that could not continue, or a check that failed, though the user made no mistake.

    The commands print it without a traceback and exit with status 1.
    """


def report(error: BaseException) -> int:
    """Prints the error that ended a command, and returns the exit status that goes with it.

    An error that is neither a UserError nor a RunFailed is a bug, and gets a traceback.
    """
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, RunFailed):
        print(f"failed: {error}", file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):  # its reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    traceback.print_exception(error)
    return 1


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error message."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def listed(faults: Iterable[str], limit: int = 5, separator: str = "; ") -> str:
    """Joins faults for a message; of those beyond `limit`, only the number is given."""
    # Names come from files, and might hold control characters of a terminal.
    faults = [fault if fault.isprintable() else ascii(fault) for fault in faults]
    more = [f"and {len(faults) - limit} more"] if len(faults) > limit else []
    return separator.join([*faults[:limit], *more])


def nearest(name: object, options: Iterable[object]) -> str:
    """Returns a hint for the user after an unknown `name`.

    Args:
      name: the name that the user wrote.
      options: all accepted names.

    Returns:
      "did you mean 'X'?" if an option is close, "known are 'X', 'Y', ..." if none is; both if one
      is close and there are few options.
    """
    known = [str(option) for option in options]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    every = "known are " + ", ".join(repr(option) for option in known)
    if not close:
        return every
    return f"did you mean {close[0]!r}?" + (f" ({every})" if len(known) <= 6 else "")
