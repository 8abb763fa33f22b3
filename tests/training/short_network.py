"""Runs `mbv2_jax.main` with a third of the network's layers.

On CPUs the processes of a run cannot share what they compiled, so each start compiles everything;
with one block a stage, and no expansion in it, that takes seconds instead of most of a minute. All
else is the real command.
"""

from typing import Any

from mbv2_jax.models import mobilenet_v2

STAGES: Any = tuple(stage._replace(expansion=1, blocks=1) for stage in mobilenet_v2.STAGES)
mobilenet_v2.STAGES = STAGES

from mbv2_jax import command_line, main  # noqa: E402

if __name__ == "__main__":
    command_line.run(main.main)
