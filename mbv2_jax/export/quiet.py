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
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stderr(nowhere):
                yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
