"""Devices, processes and the host that a run lives on."""
