"""The start of a run of several processes: how a process learns of the others and meets them."""

import glob
import importlib.util
import os
import socket
from typing import NamedTuple, Protocol

import jax

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.runtime.last_words import LastWords

_ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX's own variable
_SHUTDOWN_TIMEOUT = 60  # seconds for which a process that is done waits for the others


class Address(NamedTuple):
    """The place of a process in a run, as the command line gives it; None: not given.

    Attributes:
      coordinator_address: HOST:PORT of process 0, where the port must be free.
      num_processes: the number of processes of the run.
      process_id: the number of this process, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class Timeouts(Protocol):
    """The timeouts of a run, as the config's `distributed` section has them.

    Attributes:
      initialization_timeout: seconds for which a process waits for the others to start.
      heartbeat_timeout: seconds of silence after which a process counts as dead.
    """

    initialization_timeout: int
    heartbeat_timeout: int


def complete(address: Address) -> Address:
    """Returns the address with the coordinator that the environment names, if none is given."""
    if address.coordinator_address is None and None not in address[1:]:
        return address._replace(coordinator_address=os.environ.get(_ADDRESS))
    return address


def has_others(address: Address) -> bool:
    """Returns whether the run has processes beside this one.

    Args:
      address: this process's. Where it is empty, Slurm, Open MPI and TPU slices are recognised.

    Raises:
      UserError: only a part of the address is given, or it is not possible.
    """
    host_port, count, index = address
    if count == 1 and host_port is None and index in (None, 0):
        return False  # and JAX does not ask Slurm and the others
    if address == Address() and (_started_by_launcher() or _has_tpu()):
        return True
    if address == Address() and _ADDRESS not in os.environ:
        return False
    if host_port is None or count is None or index is None:
        raise UserError(
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=I go together, "
            "the first two the same on every host. Slurm, Open MPI and TPU slices need none of "
            f"them; {_ADDRESS} in the environment stands for the first; --num_processes=1 is a run "
            "of this process alone"
        )
    host, _, port = host_port.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address={host_port}: give HOST:PORT of process 0, such as 10.0.0.1:1234"
        )
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} of --num_processes={count}: processes are numbered from 0 to "
            f"{count - 1}"
        )
    return True


def connect(address: Address, timeouts: Timeouts, last_words: LastWords) -> None:
    """Connects this process to the others of the run.

    Where they do not start in time, JAX aborts this process; `last_words` then tell the user.

    Raises:
      UserError: the processes cannot meet at this address.
    """
    where = address.coordinator_address or "the coordinator that JAX found"
    total = f" of {address.num_processes}" if address.num_processes else ""
    this = f"process {address.process_id}{total} on {socket.gethostname()} "
    last_words.set(
        f"failed: {'' if address.process_id is None else this}did not meet the others at {where} "
        f"within {timeouts.initialization_timeout} s (distributed.initialization_timeout). Start "
        "the same command on every host, with the same address and number of processes and each "
        "with its own --process_id; the address is process 0's, and its port must be reachable"
    )
    try:
        jax.distributed.initialize(
            *address,
            initialization_timeout=timeouts.initialization_timeout,
            heartbeat_timeout_seconds=timeouts.heartbeat_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the processes cannot meet at {where}: {first_line(error)}. Give "
            "--coordinator_address=HOST:PORT with a free port of process 0's host, --num_processes "
            "and --process_id; or --num_processes=1 for a run of this process alone"
        ) from None


def _started_by_launcher() -> bool:
    """Returns whether Slurm's srun or Open MPI's mpirun started this process as one of several."""
    counts = []
    if "SLURM_STEP_NODELIST" in os.environ:  # not set in a script of sbatch, which is one process
        counts.append(os.environ.get("SLURM_NTASKS", ""))
    counts.append(os.environ.get("OMPI_COMM_WORLD_SIZE", ""))
    return any(text.isdecimal() and int(text) > 1 for text in counts)


def _has_tpu() -> bool:
    """Returns whether this host has TPU chips, which know the slice that they are part of."""
    wanted = (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None
