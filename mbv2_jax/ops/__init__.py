"""The operations of the network, and how each platform computes them."""
