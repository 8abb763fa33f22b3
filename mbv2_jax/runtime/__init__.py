"""The devices, the processes and the host on which a run computes."""
