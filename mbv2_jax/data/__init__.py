"""Data, from a dataset's files to batches of uint8 images on the host.

Nothing in this package initialises a jax backend: a data worker uses no device.
"""
