"""Host batches on their way to the devices."""

import gc
import weakref

import jax
import numpy as np
import pytest

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training.skipped import Skipped
from tests.support.coded import CodedSource


class HostBatches:
    """Batches {"image": (8, 5) filled with the batch's number}; it holds none itself."""

    def __init__(self, count: int):
        self.count = count
        self.made: list[weakref.ref[np.ndarray]] = []

    def __iter__(self) -> "HostBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if len(self.made) == self.count:
            raise StopIteration
        # From the second byte on: there the CPU "device" has to copy it, as others always do.
        memory = np.full(8 * 5 + 1, len(self.made), np.uint8)
        self.made.append(weakref.ref(memory))
        return {"image": memory[1:].reshape(8, 5)}


@pytest.fixture
def sent(monkeypatch) -> list[jax.Array]:
    """The arrays that were given to the devices so far."""
    arrays = []
    real = jax.make_array_from_process_local_data

    def send(sharding, array):
        arrays.append(real(sharding, array))
        return arrays[-1]

    monkeypatch.setattr(jax, "make_array_from_process_local_data", send)
    return arrays


def test_batches_arrive_in_order_split_over_the_devices():
    mesh = mesh_lib.create()
    found = list(mesh_lib.prefetch(HostBatches(5), mesh))
    assert [int(batch["image"].min()) for batch in found] == [0, 1, 2, 3, 4]
    assert [int(batch["image"].max()) for batch in found] == [0, 1, 2, 3, 4]
    for batch in found:
        shards = batch["image"].addressable_shards
        assert [shard.data.shape for shard in shards] == [(2, 5)] * 4
        assert len({shard.device for shard in shards}) == 4


def test_the_next_batches_are_in_transfer_while_one_is_used(sent):
    for number, _ in enumerate(mesh_lib.prefetch(HostBatches(6), mesh_lib.create(), ahead=2)):
        assert len(sent) == min(number + 3, 6)


def test_a_batch_leaves_the_host_when_it_is_transferred(sent):
    """It lies in memory that is shared with a worker, of which there may be little."""
    batches = HostBatches(6)
    on_the_way = map(Skipped(CodedSource(1), print).take_out, batches)  # as in training
    for _ in mesh_lib.prefetch(on_the_way, mesh_lib.create(), ahead=2):
        jax.block_until_ready(sent)
        gc.collect()
        assert [reference() for reference in batches.made] == [None] * len(sent)
