"""The processes of a run: which one this is, and how they exchange and compare values."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

import mbv2_jax
from mbv2_jax.errors import RunFailed, UserError, listed
from mbv2_jax.runtime import coordinator, failures, launch
from mbv2_jax.runtime.last_words import LastWords
from mbv2_jax.runtime.launch import Address as Address
from mbv2_jax.runtime.launch import Timeouts

_MIN_TIMEOUT = 300  # seconds to wait for a value of another process, at least
_MIN_FINAL_TIMEOUT = 600  # seconds: the others may still evaluate or save the last step


def index() -> int:
    """Returns the number of this process, from 0."""
    return coordinator.state().process_id


def count() -> int:
    """Returns the number of processes of the run."""
    return coordinator.state().num_processes


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line for the user, in process 0 only; to standard error unless `file` is given."""
    if index() == 0:
        print(text, file=file or sys.stderr, flush=True)


def software() -> dict[str, Any]:
    """Returns the versions and settings that change the result of a command, by name."""
    return {
        "mbv2_jax": mbv2_jax.__version__,
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "JAX_ENABLE_X64": jax.config.values["jax_enable_x64"],
        "JAX_DEFAULT_MATMUL_PRECISION": jax.config.values["jax_default_matmul_precision"],
    }


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them.

    Attributes:
      index: the number of this process, from 0.
      count: the number of processes.
      timeout: seconds for which `exchange` waits for the others.
    """

    index: int
    count: int
    timeout: int = _MIN_TIMEOUT

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Returns the values that all processes gave under `name`, ordered by process.

        Every process must call it.

        Args:
          name: a name for the value, also in messages; each may be used once.
          value: a value that JSON can represent.

        Raises:
          RunFailed: a process did not give its value in time.
        """
        if self.count == 1:
            return [value]
        client, key = coordinator.client(), f"mbv2_jax/{name}"
        client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        end = time.monotonic() + self.timeout
        values = []
        for other in range(self.count):
            milliseconds = max(1, int(1000 * (end - time.monotonic())))
            try:
                text = client.blocking_key_value_get(f"{key}/{other}", milliseconds)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                raise RunFailed(
                    f"process {other} did not send its {name} within {self.timeout} s: is it "
                    "stuck? (The time is distributed.initialization_timeout, "
                    f"{_MIN_TIMEOUT} s at least)"
                ) from None
            values.append(json.loads(text))
        return values

    def check_same(self, name: str, values: Mapping[str, Any], remedy: str) -> None:
        """Raises UserError, in every process, unless all of them have the same values.

        Args:
          name: a name for the values; see `exchange`.
          values: the values by their names; JSON must be able to represent them.
          remedy: a sentence for the user about how to make them the same.
        """
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        if len(set(self.exchange(f"{name} (SHA-256)", digest))) == 1:
            return
        all_values = self.exchange(name, values)
        first = all_values[0]
        faults = [
            f"process {other} has {key}={each.get(key)!r}, process 0 {first.get(key)!r}"
            for other, each in enumerate(all_values)
            for key in first.keys() | each.keys()
            if each.get(key) != first.get(key)
        ]
        if faults:
            raise UserError(
                f"the processes differ in their {name}: {listed(sorted(faults))}. {remedy}"
            )


def single() -> Group:
    """Returns the group of a process that has no others."""
    return Group(index=0, count=1)


@contextlib.contextmanager
def join(address: Address, timeouts: Timeouts, *, handles_sigterm: bool) -> Iterator[Group]:
    """Joins the processes of the run for as long as the block lasts.

    If the block raises in one process, all of them end: that one with its own error, the others
    with its message. They leave the block together.

    Args:
      address: this process's place in the run. Where it is empty, Slurm, Open MPI and TPU slices
        are recognised; without them, this process is the only one.
      timeouts: the config's `distributed` section.
      handles_sigterm: whether the block handles SIGTERM (stop.py); if not, SIGTERM ends the
        process.

    Raises:
      UserError: the address or a timeout is not possible.
    """
    for name in ("initialization_timeout", "heartbeat_timeout"):
        if (seconds := getattr(timeouts, name)) < 1:
            raise UserError(f"distributed.{name} is {seconds}: it must be 1 s or more")
    address = launch.complete(address)
    if not launch.has_others(address):
        yield single()
        return
    last_words, watch = LastWords(), None
    jax.config.update("jax_enable_preemption_service", handles_sigterm)  # which catches SIGTERM
    try:
        launch.connect(address, timeouts, last_words)
        watch = failures.FailureWatch(last_words)
        last_words.set(
            f"failed: {coordinator.describe_process()} ended without an error of its own. Either "
            "it was killed, or JAX ended it because another process died or was cut off (JAX's "
            f"lines above name it). {failures.RESUME_HINT}"
        )
        yield Group(index(), count(), max(timeouts.initialization_timeout, _MIN_TIMEOUT))
        # To processes that are still writing, an early exit of process 0 would look like its death.
        timeout = max(timeouts.initialization_timeout, _MIN_FINAL_TIMEOUT)
        coordinator.client().wait_at_barrier("mbv2_jax/done", 1000 * timeout)
        watch.close()
        jax.distributed.shutdown()
    except BaseException as error:
        failures.end_process(error, last_words, watch)
    last_words.set("")
