"""Standard error without the logs of converters and runtimes."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings, and whatever Python or a C++ library writes to standard error.

    Converters and runtimes write progress bars, versions and notes on their own set-up there, at
    import, too. Their errors are exceptions, which remain.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # the descriptor, which C++ and sys.stderr share
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
