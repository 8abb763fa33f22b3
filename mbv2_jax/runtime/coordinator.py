"""JAX's coordination service, which the first process of a run hosts for all of them.

JAX has no public interface to its state or its key-value store; Orbax uses the same private one.
Unlike jax.process_index(), it does not initialise the devices.
"""

import socket
from typing import Any


def state() -> Any:
    """Returns JAX's record of this process: process_id, num_processes, client."""
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """Returns the client of the service's key-value store and barriers."""
    return state().client


def is_first() -> bool:
    """Returns whether this is process 0, which hosts the service."""
    return state().process_id == 0


def describe_process() -> str:
    """Returns "process I of N on HOST"."""
    return f"process {state().process_id} of {state().num_processes} on {socket.gethostname()}"
