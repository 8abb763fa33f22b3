"""The command `python -m mbv2_jax.data verify|browse`, which forwards to `analysis`."""

from mbv2_jax import command_line
from mbv2_jax.analysis import data_commands

if __name__ == "__main__":
    command_line.run(data_commands.main)
