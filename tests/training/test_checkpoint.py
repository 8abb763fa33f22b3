"""A save that fails leaves the earlier checkpoints as they are."""

import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from mbv2_jax.training.checkpoint import _Manager


def test_save_that_fails_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    """Delays the news of the failure to the thread that would delete the earlier checkpoint."""
    options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy([LatestN(1)]))
    handlers = {"state": ocp.StandardCheckpointHandler()}
    manager = _Manager(tmp_path, options=options, item_handlers=handlers)

    def save(step: int) -> None:
        state = ocp.args.StandardSave({"weights": np.arange(10.0)})
        manager.save(step, args=ocp.args.Composite(state=state), force=True)

    save(1)
    manager.wait_until_finished()

    waited = _Manager._wait_for_checkpointers

    def late(manager: _Manager) -> None:
        assert threading.current_thread().name == "save_finalize"
        time.sleep(1)
        waited(manager)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(_Manager, "_wait_for_checkpointers", late)
    monkeypatch.setattr(manager._checkpointer, "_save_step_metadata", fail)

    def step_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            manager.check_for_errors()  # as training does after every step
            time.sleep(0.01)

    save(2)
    with pytest.raises(OSError, match="the disk is gone"):
        step_for(10)
    time.sleep(1)
    assert (tmp_path / "1").is_dir() and not (tmp_path / "2").exists()
