"""The networks. Their operations, and how each platform computes them, are in `mbv2_jax.ops`."""
