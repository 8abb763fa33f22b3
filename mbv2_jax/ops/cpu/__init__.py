"""Lowerings for XLA's CPU backend; only `mbv2_jax.ops` uses them."""
