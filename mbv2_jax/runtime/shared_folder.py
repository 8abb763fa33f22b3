"""Checks that all processes of a run see the same folder, on NFS, Lustre or in a bucket."""

import pathlib
import time
import uuid

from mbv2_jax.errors import UserError, listed
from mbv2_jax.runtime.processes import Group
from mbv2_jax.storage import bucket

# Seconds until a new file must be visible everywhere. NFS caches listings, but not names that were
# never looked up: for those a client asks the server.
_VISIBLE_WITHIN = 10.0
_POLL = 0.5  # seconds between two looks


def check_shared(folder: pathlib.Path, group: Group) -> None:
    """Raises UserError, in every process, unless all of them see the same workdir.

    All processes write a checkpoint, and all of them read it when a run resumes.

    Args:
      folder: the run's workdir, which exists.
      group: the processes of the run.
    """
    _require_all(folder, unseeing(folder, "workdir", group))


def check_seen(folder: pathlib.Path, inside: str, group: Group) -> None:
    """Raises UserError, in every process, unless all of them see a certain path in the workdir.

    Args:
      folder: the run's workdir.
      inside: a path in it that process 0 sees.
      group: the processes of the run.
    """
    _require_all(folder, _unseeing(folder / inside, f"view of {inside}", group))


def unseeing(folder: pathlib.Path, name: str, group: Group) -> list[int]:
    """Returns the processes that do not see a file which process 0 writes in a folder.

    Every process must call it.

    Args:
      folder: the folder as this process knows it; it exists. All processes see a bucket.
      name: a name for the folder, also in messages; each may be used once.
      group: the processes of the run.
    """
    if group.count == 1 or bucket.is_address(folder):
        return []
    token = folder / f".shared-{uuid.uuid4().hex}"
    first = group.exchange(f"file in the {name}", token.name)[0]
    try:
        if group.index == 0:
            token.touch()
        group.exchange(f"look into the {name}", True)
        return _unseeing(folder / first, f"view of the {name}", group)
    finally:
        token.unlink(missing_ok=True)


def _require_all(folder: pathlib.Path, processes: list[int]) -> None:
    if processes:
        raise UserError(
            f"--workdir {folder} is not shared: processes {listed(map(str, processes))} do not see "
            "what process 0 sees there. Give a directory that all hosts share, on NFS or Lustre, "
            "or gs://BUCKET/DIR"
        )


def _unseeing(path: pathlib.Path, name: str, group: Group) -> list[int]:
    """Returns the processes that do not see `path` within some seconds."""
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(_POLL)
    return [process for process, sees in enumerate(group.exchange(name, seen)) if not sees]
