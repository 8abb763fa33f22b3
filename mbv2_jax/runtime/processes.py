"""The processes of a run: how they find each other, agree, and end together.

JAX's coordination service, which the first process hosts, connects them. It ends every process when
one is lost, with an abort and a stack trace; what is here adds the words: what happened, where, and
what to do. A process that fails with an error of its own tells the others, which end at once
instead of waiting for heartbeats that stop.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TextIO

import jax
from ml_collections import ConfigDict

import mbv2_jax
from mbv2_jax import command_line
from mbv2_jax.errors import RunFailed, UserError, first_line, listed

_POLL = 1.0  # seconds between two looks at whether another process failed
_GRACE = 3.0  # seconds for an error of one's own to arrive, or for another's words to
_LEAST_PATIENCE = 300  # seconds for what another process does before it tells something
# Seconds that the first process stays after its last words, or another's, so that the rest, which
# read them from it, can end by themselves: JAX aborts whoever loses it.
_LINGER = _GRACE + 2 * _POLL
_GOODBYE = 60  # seconds that a process which is done waits for the others to be done
_ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX's own
_FAILED = "mbv2_jax/failed"  # the key under which a process that fails leaves its last words

# What JAX says, and what carries its sums, when another process is gone; its errors of this
# process's own (no memory left, ...) have other words.
_ANOTHERS = re.compile(
    "UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|gloo|nccl|connection|barrier|heartbeat", re.I
)

# What continues a run, whichever way it ended.
_AGAIN = (
    "What was saved is whole: give the same command again on every host to go on from the newest "
    "checkpoint"
)


class Place(NamedTuple):
    """A process's place among all, as the command line gives it; None: not given.

    Attributes:
      coordinator_address: HOST:PORT of the first process, which must be free there.
      num_processes: how many there are in all.
      process_id: which of them this one is, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@contextlib.contextmanager
def together(place: Place, timeouts: ConfigDict, *, heeds_sigterm: bool) -> Iterator[None]:
    """Joins the processes of the run, where there are several, for as long as the block lasts.

    If the block raises in one process, all end: that one with its own error, the others with its
    words. They leave the block together.

    Args:
      place: this process's; all None: Slurm, Open MPI and TPU slices are asked, and where there is
        none, this process is the only one.
      timeouts: the config's `distributed` section.
      heeds_sigterm: whether stop.py deals with SIGTERM in the block; else it ends the process.

    Raises:
      UserError: the place is not possible.
    """
    for name, seconds in timeouts.items():
        if seconds < 1:
            raise UserError(f"distributed.{name} is {seconds}: it must be 1 s or more")
    if place.coordinator_address is None and None not in place[1:]:
        place = place._replace(coordinator_address=os.environ.get(_ADDRESS))
    if not _several(place):
        yield
        return
    words, watch = _LastWords(), None
    # Which catches SIGTERM.
    jax.config.update("jax_enable_preemption_service", heeds_sigterm)
    try:
        _connect(place, timeouts, words)
        watch = _Watch(words)
        words.set(
            f"failed: {_name()} ended without an error of its own. Either it was killed, or JAX "
            f"ended it because another process died or was cut off (JAX's lines above name it). "
            f"{_AGAIN}"
        )
        yield
        _leave(timeouts, watch)
    except BaseException as error:
        _end(error, words, watch)
    words.set("")


def index() -> int:
    """Which process this is, from 0."""
    return _state().process_id


def count() -> int:
    """How many processes there are."""
    return _state().num_processes


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line for the user, once for all processes; to standard error unless told."""
    if index() == 0:
        print(text, file=file or sys.stderr, flush=True)


def exchange(name: str, value: Any, timeouts: ConfigDict) -> list[Any]:
    """Returns what every process gave under `name`, in their order; all of them must call it.

    Args:
      name: what is exchanged, for messages too; each may be used once.
      value: of types that JSON knows.
      timeouts: the config's `distributed` section: how long the others are waited for.

    Raises:
      RunFailed: a process did not get here in time.
    """
    if count() == 1:
        return [value]
    client, key = _client(), f"mbv2_jax/{name}"
    client.key_value_set(f"{key}/{index()}", json.dumps(value))
    patience = max(timeouts.initialization_timeout, _LEAST_PATIENCE)
    end = time.monotonic() + patience
    values = []
    for other in range(count()):
        left = max(1, int(1000 * (end - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{key}/{other}", left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise RunFailed(
                f"process {other} did not tell its {name} within {patience} s: is it stuck? (The "
                f"time is distributed.initialization_timeout, {_LEAST_PATIENCE} s at least)"
            ) from None
    return values


def check_same(name: str, values: Mapping[str, Any], timeouts: ConfigDict, remedy: str) -> None:
    """Raises UserError, in every process, unless all of them have the same values.

    Args:
      name: what the values are; see `exchange`.
      values: by their names.
      timeouts: the config's `distributed` section.
      remedy: what would be right.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(exchange(f"{name} (SHA-256)", digest, timeouts))) == 1:
        return
    everyones = exchange(name, values, timeouts)
    first = everyones[0]
    faults = [
        f"process {other} has {key}={each.get(key)!r}, process 0 {first.get(key)!r}"
        for other, each in enumerate(everyones)
        for key in first.keys() | each.keys()
        if each.get(key) != first.get(key)
    ]
    if faults:
        raise UserError(f"the processes differ in their {name}: {listed(sorted(faults))}. {remedy}")


def software() -> dict[str, Any]:
    """Returns what would make the same command compute something else, by name."""
    return {
        "mbv2_jax": mbv2_jax.__version__,
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "JAX_ENABLE_X64": jax.config.values["jax_enable_x64"],
        "JAX_DEFAULT_MATMUL_PRECISION": jax.config.values["jax_default_matmul_precision"],
    }


def _several(place: Place) -> bool:
    """Whether the run has other processes.

    Raises:
      UserError: only a part of the place is given, or it is not possible.
    """
    address, processes, this = place
    if processes == 1 and address is None and this in (None, 0):
        return False  # which also keeps JAX from asking Slurm and others
    if place == Place() and (_launched() or _on_tpu()):
        return True
    if place == Place() and _ADDRESS not in os.environ:
        return False
    if None in place:
        raise UserError(
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=I go together, "
            "the first two the same on every host. Slurm, Open MPI and TPU slices need none of "
            f"them; {_ADDRESS} in the environment stands for the first; --num_processes=1 is a run "
            "of this process alone"
        )
    assert address is not None and processes is not None and this is not None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address={address}: give HOST:PORT of process 0, such as 10.0.0.1:1234"
        )
    if not 0 <= this < processes:
        raise UserError(
            f"--process_id={this} of --num_processes={processes}: processes are numbered from 0 to "
            f"{processes - 1}"
        )
    return True


def _launched() -> bool:
    """Whether Slurm's srun or Open MPI's mpirun started this process as one of several."""
    counts = []
    if "SLURM_STEP_NODELIST" in os.environ:  # not in a script of sbatch, which is one process
        counts.append(os.environ.get("SLURM_NTASKS", ""))
    counts.append(os.environ.get("OMPI_COMM_WORLD_SIZE", ""))
    return any(text.isdecimal() and int(text) > 1 for text in counts)


def _on_tpu() -> bool:
    """Whether this host has TPU chips: JAX asks them, or the host, which slice they are part of."""
    wanted = (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None


def _connect(place: Place, timeouts: ConfigDict, words: "_LastWords") -> None:
    """Meets the other processes.

    Raises:
      UserError: there is no meeting them at this address. Where they do not come in time, JAX
      aborts this process; its last words say so.
    """
    where = place.coordinator_address or "the coordinator that JAX found"
    of = f" of {place.num_processes}" if place.num_processes else ""
    who = "" if place.process_id is None else f"process {place.process_id}{of} on {_host()} "
    words.set(
        f"failed: {who}did not meet the others at {where} within "
        f"{timeouts.initialization_timeout} s (distributed.initialization_timeout). Start the same "
        "command on every host, with the same address and number of processes and each with its "
        "own --process_id; the address is process 0's, and its port must be reachable"
    )
    try:
        jax.distributed.initialize(
            *place,
            initialization_timeout=timeouts.initialization_timeout,
            heartbeat_timeout_seconds=timeouts.heartbeat_timeout,
            shutdown_timeout_seconds=_GOODBYE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the processes cannot meet at {where}: {first_line(error)}. Give "
            "--coordinator_address=HOST:PORT with a free port of process 0's host, --num_processes "
            "and --process_id; or --num_processes=1 for a run of this process alone"
        ) from None


def _leave(timeouts: ConfigDict, watch: "_Watch") -> None:
    """Waits for all to be done, and parts.

    Else the first one's absence would look like its death to those which still write.
    """
    # An evaluation or a save of the last step is what the others may still be at.
    patience = 1000 * max(600, timeouts.initialization_timeout)
    _client().wait_at_barrier("mbv2_jax/done", patience)
    watch.close()
    jax.distributed.shutdown()


def _end(error: BaseException, words: "_LastWords", watch: "_Watch | None") -> None:
    """Says what went wrong, here and in the other processes, and ends this one.

    The interpreter's own end would wait for the others, at JAX's shutdown, and then abort.
    """
    if watch is not None:
        watch.close()
        if isinstance(error, jax.errors.JaxRuntimeError) and (said := _others_words(_GRACE)):
            _follow(said, words, _LINGER)  # its end broke off what was computed here
    if isinstance(error, jax.errors.JaxRuntimeError) and _ANOTHERS.search(str(error)):
        text = "what all processes compute together broke off, perhaps because one of them died"
        error = RunFailed(f"{_name()}: {text}: {first_line(error)}. {_AGAIN}")
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    else:
        status = command_line.report(error)
    tells = status != 0 or isinstance(error, BrokenPipeError)
    # Said again, should JAX abort this process before it has told the others.
    words.set(f"failed: {_said(error)}" if tells else "")
    if tells and jax.distributed.is_initialized():
        with contextlib.suppress(Exception):  # the others may be gone already
            _client().key_value_set(_FAILED, f"{_name()}: {_said(error)}")
        if index() == 0:
            time.sleep(_LINGER)
    words.set("")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    kind = "" if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"


def _host() -> str:
    return socket.gethostname()


def _name() -> str:
    return f"process {index()} of {count()} on {_host()}"


def _state() -> Any:
    """JAX's own: unlike jax.process_index(), it makes no devices start."""
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    """The key-value store of JAX's coordination service.

    JAX has no public name for it; Orbax and others use it by this one.
    """
    return _state().client


class _Watch:
    """Ends this process when another one has said that it failed."""

    def __init__(self, words: "_LastWords"):
        self._words, self._done = words, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_POLL):
            said = _others_words()
            if not said:
                continue
            self._words.set(_last_words(said))  # should JAX abort this process meanwhile
            # Unless this process is ending, by an error of its own: the same one, perhaps.
            if not self._done.wait(_GRACE):
                _follow(said, self._words, 2 * _POLL)  # the others have had the grace, too


def _others_words(within: float = 0.0) -> str | None:
    """Returns the last words of another process that failed; None where there are none.

    Args:
      within: seconds to wait.
    """
    end = time.monotonic() + within
    while True:
        # Nobody has said any; or the service is gone, which JAX ends this process for.
        with contextlib.suppress(Exception):
            return _client().key_value_try_get(_FAILED)
        if time.monotonic() >= end:
            return None
        time.sleep(_POLL / 4)


def _last_words(said: str) -> str:
    """Returns the lines with which a process ends that ends with another one."""
    return f"failed: {said}\n{_name()} ends with it. {_AGAIN}"


def _follow(said: str, words: "_LastWords", linger: float) -> NoReturn:
    """Ends this process with the words of the one that failed; the first one after `linger` s."""
    print(_last_words(said), file=sys.stderr, flush=True)
    words.set(_last_words(said))  # said again, should JAX abort this process before its end
    if index() == 0:
        time.sleep(linger)
    words.set("")
    os._exit(1)


class _LastWords:
    """A line that is printed if this process dies without a word, killed or aborted.

    A small process of its own waits for that: no signal handler of Python's runs in an abort.
    """

    def __init__(self) -> None:
        program = (
            "import signal, sys\n"
            # A cluster may send it to every process of a job.
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "sys.stderr.write([*sys.stdin, ''][-2:][0].lstrip())"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a signal to the group is not for it
        )

    def set(self, text: str) -> None:
        """Prepares a line; "" for none."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(" ".join(text.split()) + "\n")
            self._process.stdin.flush()
