"""Images from their source to uint8 batches, on the host.

Nothing in here initialises a jax backend: a data worker touches no device.
"""
