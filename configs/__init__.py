"""The recipes: one file each. Installed as `mbv2_jax.configs`."""
