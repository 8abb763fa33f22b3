"""Worker processes: they make the same batches, pass errors on, and always end.

A worker takes seconds to start (Grain imports jax), so each test asks as much as it can of its own.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mbv2_jax.data.loader import eval_batches, train_batches
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError
from tests.support.coded import CodedSource, LabelCollator, PhotoSource, indices

RANDOM = make_transform("random_crop(size, padding=4)|random_flip(0.5)", 8)

# Takes batches until a signal, then some more as a training step would, and exits.
RUN = """
import contextlib, multiprocessing, signal, sys, time
from mbv2_jax.data.loader import train_batches
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support.coded import CodedSource, LabelCollator

def main():
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    batches = train_batches(CodedSource(100), make_transform("resize(size)", 8), LabelCollator(),
                            batch_size=8, seed=0, start=0, stop=int(sys.argv[1]), workers=2)
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            if number == 0:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(0.01)
            if stopped:
                stopped.append(1)
            if len(stopped) > 20:  # more than the workers had ready
                break
    del batch
    with open("/proc/self/maps") as maps:
        print("finished, holds shared memory" if "/psm_" in maps.read() else "finished", flush=True)

if __name__ == "__main__":
    main()
"""


# Operations that draw random numbers, and options that change the examples in a batch.
EVERYTHING = make_transform(
    "random_resized_crop(size)|random_flip(0.5)|color_jitter(0.4, 0.4, 0.4, 0.1)"
    "|rand_augment()|random_erasing(0.5, mode='noise')",
    24,
)


@pytest.mark.parametrize(
    ("workers", "start", "stop", "options"),
    [
        (1, 3, 14, {"corrupt": "skip", "repeats": 2}),
        (4, 12, 15, {"decode_as": "fast"}),  # a worker has nothing to do
    ],
)
def test_any_number_of_workers_gives_the_same_batches(workers, start, stop, options):
    """An epoch has 6 batches, so they also start in its middle, as after a restart."""
    source = PhotoSource(45, broken=(3, 30) if "corrupt" in options else ())

    def batches(workers, start):
        with contextlib.closing(
            train_batches(
                source,
                EVERYTHING,
                LabelCollator(),
                batch_size=8,
                seed=7,
                start=start,
                stop=stop,
                workers=workers,
                **options,
            )
        ) as iterator:
            return list(iterator)

    expected, found = batches(0, 0)[start:], batches(workers, start)
    assert len(found) == len(expected) == stop - start
    for a, b in zip(expected, found, strict=True):
        assert type(b["image"]) is np.ndarray
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert multiprocessing.active_children() == []


def test_evaluation_scores_each_example_once_and_a_broken_one_is_named():
    plain, seen = make_transform("resize(size)", 8), []

    def evaluate(batches):
        for batch in batches:
            seen.extend(np.array(indices(batch))[batch["mask"]].tolist())

    with contextlib.closing(
        eval_batches(CodedSource(30, broken=29), plain, LabelCollator(), batch_size=8, workers=2)
    ) as batches:
        with pytest.raises(UserError) as error:
            evaluate(batches)
        assert seen == list(range(24))
        assert str(error.value) == (
            "coded/29.png: cannot decode the image (8 bytes): not the bytes of an image file"
        )


def test_a_killed_worker_is_explained():
    batches = train_batches(
        CodedSource(8),
        RANDOM,
        LabelCollator(),
        batch_size=8,
        seed=0,
        start=0,
        stop=1_000_000,
        workers=1,
    )
    with contextlib.closing(batches):
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        # The batches that it had made come first.
        with pytest.raises(UserError, match=r"a data worker was killed \(.*exit code -9\)"):
            list(batches)


def start_run(stop: int = 1_000_000) -> tuple[subprocess.Popen, list[int]]:
    """Starts RUN in a process group of its own; returns it and its workers' process ids."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(stop)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    return run, workers


def running(pid: int) -> bool:
    """Returns whether the process runs; a zombie does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_end(pids: list[int]) -> list[int]:
    """Returns the processes that still run after ten seconds."""
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_run_to_the_last_batch_leaves_nothing_behind():
    run, workers = start_run(stop=6)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "finished\n")
    assert err == ""  # no shared memory left to clean up
    assert wait_for_end(workers) == []


def test_signals_to_the_whole_group_leave_the_decision_to_the_parent():
    """After Ctrl-C or a cluster's SIGTERM the parent still gets its batches."""
    run, workers = start_run()
    os.killpg(run.pid, signal.SIGINT)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "finished\n")
    assert err == ""  # no traceback of a worker, no shared memory left to clean up
    assert wait_for_end(workers) == []


def test_workers_end_with_a_killed_parent():
    run, workers = start_run()
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert wait_for_end(workers) == []
