"""The logs of a run in a bucket: written on a local disk, and copied to the workdir."""

import concurrent.futures
import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

from mbv2_jax.errors import RunFailed
from mbv2_jax.storage import bucket

INTERVAL = 60.0  # seconds between two copies in the background


class Mirror:
    """A folder for the logs of a run: its workdir, or a local folder that is copied there.

    Objects in a bucket cannot be appended to, so each file that has changed is copied whole. A
    thread does it, one file after the other, so that training does not wait.

    Args:
      workdir: on a disk, where nothing needs to be copied, or in a bucket.
      check: a function that raises RunFailed where the workdir belongs to another run by now.

    Attributes:
      folder: the local folder to write to.
    """

    def __init__(self, workdir: pathlib.Path, check: Callable[[], None]):
        self._workdir, self._check = workdir, check
        self._copies = bucket.is_address(workdir)
        self.folder = workdir
        if not self._copies:
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mbv2_jax-"))
        # The modification time and the size of each file when it was last copied.
        self._versions: dict[pathlib.Path, tuple[int, int]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "mirror")
        self._latest: concurrent.futures.Future[None] | None = None
        self._time = time.monotonic()
        with contextlib.suppress(FileNotFoundError), bucket.as_oserror(workdir):
            lines = (workdir / "metrics.jsonl").read_bytes()
            (self.folder / "metrics.jsonl").write_bytes(lines)

    def copy_in_background(self) -> None:
        """Starts a copy if the last one was a minute ago, without waiting for it."""
        if not self._copies or time.monotonic() - self._time < INTERVAL:
            return
        if self._latest is None or self._latest.done():
            self._time = time.monotonic()
            self._latest = self._pool.submit(self._copy)

    def copy(self) -> None:
        """Copies everything that was written so far, and waits for it.

        Raises:
          RunFailed: the workdir cannot be written, or belongs to another run by now.
        """
        if self._copies:
            self._time = time.monotonic()
            self._pool.submit(self._copy).result()

    def close(self) -> None:
        """Copies a last time, and removes the local folder even if that fails."""
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
            if self._versions.get(file) == version or file.name.startswith("."):
                continue
            target = self._workdir / file.relative_to(self.folder).as_posix()
            try:
                with bucket.as_oserror(target):
                    target.write_bytes(file.read_bytes())
            except OSError as error:
                raise RunFailed(f"{target} cannot be written: {error.strerror}") from None
            self._versions[file] = version
