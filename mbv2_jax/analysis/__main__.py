"""The command `python -m mbv2_jax.analysis report|cam|embedding|schedule`."""

from mbv2_jax import command_line
from mbv2_jax.analysis import model_commands

if __name__ == "__main__":
    command_line.run(model_commands.main)
