"""Runs `mbv2_jax.predict` with the network of short_network.py."""

from tests.support import short_network

if __name__ == "__main__":
    from mbv2_jax import command_line, predict

    with short_network.in_use():
        command_line.run(predict.main)
