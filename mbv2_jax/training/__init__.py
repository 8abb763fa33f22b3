"""The training and evaluation of any task: state, optimizer, step, loop, checkpoints, logs."""
