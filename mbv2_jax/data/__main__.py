"""The command `python -m mbv2_jax.data verify|browse`, which forwards to `analysis.command`."""

from mbv2_jax import command_line
from mbv2_jax.analysis import command

if __name__ == "__main__":
    command_line.run(command.main)
