"""Tests of mbv2_jax.data."""
