"""Runs one training as several processes that communicate over loopback."""

import concurrent.futures
import contextlib
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

from tests.support import REPOSITORY, commands

# Lower than the default, with which tests would wait 90 seconds for every process that dies.
HEARTBEAT = 10  # seconds


def free_port(candidates: Sequence[int] = (0,)) -> int:
    """Returns the first port of `candidates` on which nothing listens; candidate 0 is any port."""
    for port in candidates:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return found.getsockname()[1]
    raise AssertionError("all ports are taken")


def start(
    cache: pathlib.Path,
    *arguments: str,
    processes: int = 2,
    devices: int = 2,
    each: Sequence[Sequence[str]] = (),
    folders: Sequence[pathlib.Path] = (),
    module: str = commands.SHORT,
    missing: Sequence[int] = (),
) -> list[subprocess.Popen[str]]:
    """Starts the processes of one run; jax computes in float64 if the config asks for it.

    A single process gets no flags about processes.

    Args:
      cache: see `commands.environment`.
      arguments: the arguments of every process.
      processes: the number of processes.
      devices: the number of devices of each process.
      each: further arguments of the first process, the second, ...
      folders: the working directory of each process; by default the repository.
      module: the command's module.
      missing: the numbers of processes that are not started.
    """
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices} {commands.QUICKLY}"
    joined = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        commands.start(
            cache,
            *arguments,
            *([*joined, f"--process_id={index}"] if processes > 1 else []),
            f"--config.distributed.heartbeat_timeout={HEARTBEAT}",
            *(each[index] if each else ()),
            module=module,
            cwd=folders[index] if folders else REPOSITORY,
            env={
                "JAX_ENABLE_X64": "1",
                # Other machines must not reach it.
                "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
                "XLA_FLAGS": flags,
            },
        )
        for index in range(processes)
        if index not in missing
    ]


def finish(
    group: Sequence[subprocess.Popen[str]], within: float = 300
) -> list[tuple[int, str, str]]:
    """Waits for all processes to end; returns the exit status and the outputs of each."""
    # Read all pipes at once: a process whose pipe is full blocks, and a failed save fills it.
    try:
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=within), group))
    except subprocess.TimeoutExpired:
        kill(group)
        raise AssertionError(f"still at work after {within} s: {group[0].args!r}") from None
    return [(process.returncode, *output) for process, output in zip(group, outputs, strict=True)]


def run(cache: pathlib.Path, *arguments: str, **how: object) -> list[tuple[int, str, str]]:
    """Starts the processes of a run, and waits for them."""
    return finish(start(cache, *arguments, **how))  # type: ignore[arg-type]


def kill(group: Sequence[subprocess.Popen[str]]) -> None:
    """Kills the processes of a group that still run."""
    for process in group:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], object], group: Sequence[subprocess.Popen[str]]) -> None:
    """Waits until the condition holds; fails if a process ends before."""
    end = time.monotonic() + 240
    while not condition():
        for process in group:
            assert process.poll() is None, f"ended too early: {finish(group, 30)}"
        assert time.monotonic() < end, "nothing seen in four minutes"
        time.sleep(0.001)
