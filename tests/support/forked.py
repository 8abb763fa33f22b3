"""Runs a command line many times in forks of one process, whose imports take seconds only once.

    python -m tests.support.forked < RUNS

RUNS is JSON: a list of {"arguments", "environment", "stdout", "stderr"}, of which the last two are
files to write. Each runs as `python -m mbv2_jax.main ARGUMENTS` would, except that modules are
already imported; no jax backend is initialised before the fork. The exit statuses are printed as
JSON.
"""

import json
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


def child(how: Mapping[str, Any]) -> NoReturn:
    """Runs one command in this process, and exits with its status."""
    status = 1
    try:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(how[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(how["environment"])
        sys.argv[1:] = how["arguments"]
        runpy.run_module("mbv2_jax.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Runs the commands, as many at a time as there are cores."""
    runs = json.load(sys.stdin)
    import mbv2_jax.data.digits
    import mbv2_jax.training.compile
    import mbv2_jax.training.loop  # noqa: F401

    statuses = [0] * len(runs)
    running: dict[int, int] = {}  # process -> number

    def wait_for_one() -> None:
        process, status = os.wait()
        statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)

    for number, how in enumerate(runs):
        if len(running) == os.cpu_count():
            wait_for_one()
        process = os.fork()
        if process == 0:
            child(how)
        running[process] = number
    while running:
        wait_for_one()
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
