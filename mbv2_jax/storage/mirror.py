"""The logs of a run whose workdir is in a bucket: written on a disk, and copied there."""

import concurrent.futures
import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

from mbv2_jax.errors import RunFailed
from mbv2_jax.storage import bucket

INTERVAL = 60.0  # seconds between two copies that nothing waits for


class Mirror:
    """Where the logs of a run are written: its workdir; or a folder that is copied to it.

    An object store cannot append: each file is copied whole when it has changed. A thread does it,
    one file after the other, so that training does not wait.

    Args:
      workdir: on a disk, then nothing is copied; or in a bucket.
      check: raises RunFailed where the workdir is no longer this run's.

    Attributes:
      folder: where to write.
    """

    def __init__(self, workdir: pathlib.Path, check: Callable[[], None]):
        self._workdir, self._check = workdir, check
        self._copies = bucket.is_address(workdir)
        self.folder = workdir
        if not self._copies:
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mbv2_jax-"))
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}  # file -> its time and size then
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "mirror")
        self._last: concurrent.futures.Future[None] | None = None
        self._time = time.monotonic()
        with contextlib.suppress(FileNotFoundError), bucket.as_oserror(workdir):
            lines = (workdir / "metrics.jsonl").read_bytes()
            (self.folder / "metrics.jsonl").write_bytes(lines)

    def now_and_then(self) -> None:
        """Starts a copy if the last one is a while ago; does not wait for it."""
        if not self._copies or time.monotonic() - self._time < INTERVAL:
            return
        if self._last is None or self._last.done():
            self._time = time.monotonic()
            self._last = self._pool.submit(self._copy)

    def copy(self) -> None:
        """Returns when everything that was written so far is in the workdir.

        Raises:
          RunFailed: it cannot be written, or is no longer this run's.
        """
        if self._copies:
            self._time = time.monotonic()
            self._pool.submit(self._copy).result()

    def close(self) -> None:
        """Copies a last time, if that is possible, and removes the folder."""
        if not self._copies:
            return
        try:
            self.copy()
        finally:
            self._pool.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _copy(self) -> None:
        self._check()
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            status = file.stat()
            version = status.st_mtime_ns, status.st_size
            if self._copied.get(file) == version or file.name.startswith("."):
                continue
            target = self._workdir / file.relative_to(self.folder).as_posix()
            try:
                with bucket.as_oserror(target):
                    target.write_bytes(file.read_bytes())
            except OSError as error:
                raise RunFailed(f"{target} cannot be written: {error.strerror}") from None
            self._copied[file] = version
