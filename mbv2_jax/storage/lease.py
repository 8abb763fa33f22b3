"""A lease on a workdir in a bucket, which keeps a second run out.

A bucket has no lock that ends with the process that holds it. It has conditional writes: an object
is written only if its generation is the expected one. The run that wrote `.lock` last owns the
workdir, and rewrites it every few seconds to show that it is alive. A run that finds a lease which
nobody has renewed for a while takes it over, since its owner was killed and this may be the
continuation. A run that has lost its lease, because its host slept or lost its network, stops
before it writes anything more, since another run may be at work.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any

from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.storage import bucket

RENEWAL_INTERVAL = 10.0  # seconds between two renewals
LIFETIME = 60.0  # seconds without a renewal, after which a lease has expired
_POLL = 1.0  # seconds, at most, between two looks at another run's lease


class Lease:
    """The exclusive right of one run to write to a workdir in a bucket.

    A context manager. Entering it raises UserError where another run is alive, or where nothing can
    be written.

    Args:
      workdir: a folder in a bucket.
      interval: seconds between two renewals.
      lifetime: seconds without a renewal after which another run may take over.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        interval: float = RENEWAL_INTERVAL,
        lifetime: float = LIFETIME,
    ):
        self._workdir, self._interval, self._lifetime = workdir, interval, lifetime
        self._token = uuid.uuid4().hex
        self._blob = bucket.blob(workdir / ".lock")
        self._generation = 0  # of the lease as this process last saw it
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_closed, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        try:
            self._acquire()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--workdir {self._workdir} cannot be written: {first_line(error)}"
            ) from None
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a lease that is not deleted expires by itself
            if self._is_ours():
                self._blob.delete(if_generation_match=self._generation)

    def check(self) -> None:
        """Raises RunFailed if the workdir no longer belongs to this run."""
        try:
            owner = self._read_owner()
        except Exception as error:
            raise RunFailed(
                f"{self._workdir} can no longer be reached: {first_line(error)}"
            ) from None
        if owner.get("token") != self._token:
            raise RunFailed(
                f"another run took over {self._workdir}{describe_owner(owner)}, because this run "
                f"did not renew its lease for {self._lifetime:.0f} s. This run stops, and leaves "
                "the workdir as it is"
            )

    def _acquire(self) -> None:
        from google.api_core import exceptions

        waited = False
        while True:
            with contextlib.suppress(exceptions.PreconditionFailed):
                self._write()
                return
            found = self._find()
            owner = self._read_owner()
            if (
                found and owner.get("token") == self._token
            ):  # this run wrote it, and the answer was lost
                self._generation = found.generation
                return
            self._generation = found.generation if found else 0
            remaining = self._lifetime - self._age(found) if found else 0.0
            if remaining <= 0:
                continue  # take over exactly this generation
            if not waited:
                report_wait(self._workdir, owner, remaining, "it is alive")
                waited = True
            if self._is_renewed(within=remaining):
                raise in_use(self._workdir, owner)

    def _is_renewed(self, within: float) -> bool:
        """Watches another run's lease; returns whether it is renewed within so many seconds."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            time.sleep(min(_POLL, self._interval / 2))
            found = self._find()
            if found is None:  # the other run has ended
                return False
            if found.generation != self._generation:
                return True
        return False

    def _age(self, found: Any) -> float:
        """Returns the seconds since an object was written, by the bucket's clock."""
        probe = self._blob.bucket.blob(f"{self._blob.name}.{self._token}")
        probe.upload_from_string(b"")
        probe.delete()
        return probe.updated.timestamp() - found.updated.timestamp()

    def _find(self) -> Any:
        """Returns the lease's object as it is now; None where there is none."""
        return self._blob.bucket.get_blob(self._blob.name)

    def _write(self) -> None:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": self._token})
        self._blob.upload_from_string(text, if_generation_match=self._generation)
        self._generation = self._blob.generation

    def _read_owner(self) -> dict[str, Any]:
        """Returns the lease's {"host", "pid", "token"}; {} where there is no lease."""
        from google.api_core import exceptions

        try:
            return parse_owner(self._blob.bucket.blob(self._blob.name).download_as_bytes())
        except exceptions.NotFound:
            return {}

    def _is_ours(self) -> bool:
        return self._read_owner().get("token") == self._token

    def _renew_until_closed(self) -> None:
        """Renews the lease until it is closed, or until another run has it."""
        from google.api_core import exceptions

        while not self._closed.wait(self._interval):
            try:
                self._write()
            except exceptions.PreconditionFailed:
                # Another run has the lease; or this run has, and the answer to its write was lost.
                with contextlib.suppress(Exception):
                    found = self._find()
                    if found is None or not self._is_ours():
                        return  # `check` reports it
                    self._generation = found.generation
            except Exception:  # of the network: the next renewal may succeed
                continue


def parse_owner(text: str | bytes) -> dict[str, Any]:
    """Returns the JSON object in a lock or a lease; {} where it is not written yet."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def describe_owner(owner: dict[str, Any]) -> str:
    """Returns " (HOST, process PID)" for the owner of a lock or a lease; "" where it is unknown."""
    return f" ({owner['host']}, process {owner['pid']})" if {"host", "pid"} <= owner.keys() else ""


def report_wait(workdir: pathlib.Path, owner: dict[str, Any], seconds: float, whether: str) -> None:
    """Tells the user that this run waits to see whether the owner of a workdir is alive."""
    print(
        f"another run is or was at work in {workdir}{describe_owner(owner)}: waiting up to "
        f"{seconds:.0f} s to see whether {whether}",
        file=sys.stderr,
        flush=True,
    )


def in_use(workdir: pathlib.Path, owner: dict[str, Any]) -> UserError:
    """Returns the error that another run is at work in a workdir."""
    return UserError(
        f"another run is at work in {workdir}{describe_owner(owner)}: wait for it, or give another "
        "--workdir"
    )
