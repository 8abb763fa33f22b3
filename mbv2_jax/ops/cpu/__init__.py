"""Lowerings for XLA's CPU backend, which only `mbv2_jax.ops` itself uses."""
