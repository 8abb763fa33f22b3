"""Keeps a second run out of a workdir in a bucket.

There is no lock there that ends with the process that holds it. What there is: an object that is
written only if it is as it was (its generation says so). The run that wrote `.lock` last owns the
workdir, and writes it anew every few seconds to show that it lives. Who finds one that was not
written for a while takes it over: the run was killed, and this may be its continuation. A run that
finds that it lost its lease, because its host slept or had no network, stops before it writes
anything more, since another one may be at work.
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

RENEW = 10.0  # seconds between two signs of life
LAPSE = 60.0  # seconds without one, after which a lease counts for nothing


class Lease:
    """The right of one run to write a workdir in a bucket. A context manager.

    Entering it raises UserError where another run lives, or where nothing can be written.

    Args:
      workdir: in a bucket.
      renew: seconds between two signs of life.
      lapse: seconds without one after which another run may take over.
    """

    def __init__(self, workdir: pathlib.Path, renew: float = RENEW, lapse: float = LAPSE):
        self._workdir, self._renew, self._lapse = workdir, renew, lapse
        self._token = uuid.uuid4().hex
        self._blob = bucket.blob(workdir / ".lock")
        self._generation = 0  # of the lease that was written last
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        try:
            self._claim()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--workdir {self._workdir} cannot be written: {first_line(error)}"
            ) from None
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # one that stays lapses by itself
            if self._owner().get("token") == self._token:
                self._blob.delete(if_generation_match=self._generation)

    def check(self) -> None:
        """Raises RunFailed if the workdir is no longer this run's."""
        try:
            owner = self._owner()
        except Exception as error:
            raise RunFailed(
                f"{self._workdir} cannot be reached any more: {first_line(error)}"
            ) from None
        if owner.get("token") != self._token:
            raise RunFailed(
                f"another run took over {self._workdir}{who(owner)}, since this one gave no sign "
                "of life for a while; it stops, and leaves what is there as it is"
            )

    def _claim(self) -> None:
        from google.api_core import exceptions

        told = False
        while True:
            with contextlib.suppress(exceptions.PreconditionFailed):
                self._write()
                return
            found = self._blob.bucket.get_blob(self._blob.name)
            owner = self._owner()
            if found and owner.get("token") == self._token:  # of a request whose answer was lost
                self._generation = found.generation
                return
            self._generation = found.generation if found else 0
            idle = self._now() - found.updated.timestamp() if found else self._lapse
            if idle >= self._lapse:
                continue  # take over this very generation
            if not told:
                print(
                    f"another run is or was at work in {self._workdir}{who(owner)}: waiting up to "
                    f"{self._lapse - idle:.0f} s to see whether it lives",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            if self._is_renewed(until=time.monotonic() + self._lapse - idle):
                raise UserError(
                    f"another run is at work in {self._workdir}{who(owner)}: wait for it, or give "
                    "another --workdir"
                )

    def _is_renewed(self, until: float) -> bool:
        """Watches the lease; returns whether its owner gave a sign of life."""
        while time.monotonic() < until:
            time.sleep(min(1.0, self._renew / 2))
            found = self._blob.bucket.get_blob(self._blob.name)
            if found is None:  # given back
                return False
            if found.generation != self._generation:
                return True
        return False

    def _now(self) -> float:
        """Returns the store's time, as seconds since 1970: hosts' clocks differ."""
        probe = self._blob.bucket.blob(f"{self._blob.name}.{self._token}")
        probe.upload_from_string(b"")
        probe.delete()
        return probe.updated.timestamp()

    def _write(self) -> None:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": self._token})
        self._blob.upload_from_string(text, if_generation_match=self._generation)
        self._generation = self._blob.generation

    def _owner(self) -> dict[str, Any]:
        """Returns what the lease says; {} where there is none."""
        from google.api_core import exceptions

        try:
            owner = json.loads(self._blob.bucket.blob(self._blob.name).download_as_bytes())
        except (exceptions.NotFound, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _keep(self) -> None:
        """Gives signs of life until the end, or until the lease is another's."""
        from google.api_core import exceptions

        while not self._end.wait(self._renew):
            try:
                self._write()
            except exceptions.PreconditionFailed:
                # Another's; or our own, of a request whose answer was lost.
                with contextlib.suppress(Exception):
                    found = self._blob.bucket.get_blob(self._blob.name)
                    if found is None or self._owner().get("token") != self._token:
                        return  # `check` says it
                    self._generation = found.generation
            except Exception:  # of the network: the next sign may come through
                continue


def who(owner: dict[str, Any]) -> str:
    """Returns the process that a lock or a lease is of, in brackets; "" where it does not say."""
    return f" ({owner['host']}, process {owner['pid']})" if {"host", "pid"} <= owner.keys() else ""
