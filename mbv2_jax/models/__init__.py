"""The networks: what is computed. `mbv2_jax.ops` holds how."""
