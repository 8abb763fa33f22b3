"""One run as several processes on loopback: as one process, killed, stopped, told apart."""

import json
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess

import numpy as np
import pytest

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import processes
from tests.support import commands, groups
from tests.support.commands import checkpoints, logged_step

STEPS = 20
# 30 steps are an epoch. In float64 and with a low rate rounding stays rounding: in float32, or with
# the digits' own rate, it grows a hundredfold every few steps, whatever the devices.
RUN = (
    "--config.num_epochs=0.667",
    "--config.log.eval_every_epochs=0.4",
    "--config.checkpoint.every_steps=5",
    "--config.model.dtype=float64",
    "--config.schedule.base_lr=0.005",
)


def same_end(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Asserts that two runs ended with the same bits, in state, model and log."""
    assert commands.metrics(workdir) == commands.metrics(whole)
    for item in (f"checkpoints/{STEPS}/state", "model/arrays"):
        ours, theirs = commands.arrays(workdir / item), commands.arrays(whole / item)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def as_accurate(line: str, other: str) -> None:
    """Asserts that two last lines have the same counts."""
    ours, theirs = json.loads(line), json.loads(other)
    assert theirs["examples"] == 360
    for name in ("top1", "top5", "examples"):
        assert ours[name] == theirs[name]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)  # float64, see `close`


def close(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Asserts that two runs in float64 ended with the same state."""
    ours = commands.arrays(workdir / f"checkpoints/{STEPS}/state")
    theirs = commands.arrays(whole / f"checkpoints/{STEPS}/state")
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Sums are in another order: 1e-16 a step, which 20 steps amplify.
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9, err_msg=name)


def dies(process: subprocess.Popen[str], survivor: subprocess.Popen[str]) -> str:
    """Kills a process with SIGKILL; returns what the other one says as it ends, in time."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Two minutes are what is promised with the default heartbeats of 100 s.
    ((status, _, err),) = groups.finish([survivor], within=groups.HEARTBEAT + 50)
    assert status not in (0, -signal.SIGKILL)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("failed: ")
    assert "give the same command again on every host" in last
    return err


@pytest.fixture(scope="module")
def two(tiny, cache, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run of two processes with two devices each, that nothing stops; and its last line."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    (first, out, err), (second, silent, _) = groups.run(cache, *tiny(workdir), *RUN)
    assert (first, second) == (0, 0), err
    assert "training on 2 processes, 4 devices (cpu)" in err
    # Only the first process speaks, and Gloo, which carries the sums on CPUs: from several threads,
    # whose words may come between one another's.
    gloos = r"\[Gloo\]|Rank|is|connected|to|peer|ranks|\.|Expected|number|of|:|\d|\s"
    assert re.fullmatch(f"({gloos})*", silent), silent
    return workdir, out.splitlines()[-1]


def test_ends_as_one_process_with_as_many_devices(tiny, cache, two, tmp_path):
    whole, line = two
    ((status, out, err),) = groups.run(cache, *tiny(tmp_path / "run"), *RUN, processes=1, devices=4)
    assert status == 0, err
    as_accurate(out.splitlines()[-1], line)
    close(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_stopped_and_continued_run_equals_the_unbroken_one(tiny, cache, two, tmp_path):
    whole, line = two
    workdir = tmp_path / "run"
    arguments = [*tiny(workdir), *RUN]

    # The second process dies in mid-step.
    group = groups.start(cache, *arguments)
    groups.wait_for(lambda: checkpoints(workdir) and logged_step(workdir) >= 6, group)
    err = dies(group[1], group[0])
    saved = max(checkpoints(workdir))
    assert "process 0 of 2" in err.splitlines()[-1]

    # Ctrl-C to one, which makes a SIGTERM of it: both stop after the same step, which is saved.
    group = groups.start(cache, *arguments)
    groups.wait_for(lambda: logged_step(workdir) > saved + 1, group)
    group[1].send_signal(signal.SIGINT)
    (first, out, err), (second, _, _) = groups.finish(group)
    assert (first, second) == (0, 0), err
    assert "{" not in out  # no result
    assert f"continuing after step {saved}" in err
    stopped = max(checkpoints(workdir))
    assert saved < stopped < STEPS
    assert f"stopped after step {stopped} of {STEPS}; it is saved" in err

    (first, out, err), (second, _, _) = groups.run(cache, *arguments)
    assert (first, second) == (0, 0), err
    assert f"continuing after step {stopped}" in err
    assert out.splitlines()[-1] == line
    same_end(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_save_that_fails_in_one_process_ends_all_with_its_words(tiny, cache, tmp_path, index):
    """Loses the disk of one of two hosts, each of which writes a part of every checkpoint."""
    workdir = tmp_path / "run"
    waiting = "--config.distributed.heartbeat_timeout=100"
    large = "--config.model.last_convolution=True"  # of larger arrays than all other files
    group = groups.start(cache, *tiny(workdir), *RUN, waiting, large)
    groups.wait_for(lambda: checkpoints(workdir), group)
    before = checkpoints(workdir)
    # Below what either writes of a checkpoint, above what the first one logs.
    size = 120_000 if index == 0 else 10
    resource.prlimit(group[index].pid, resource.RLIMIT_FSIZE, (size, size))
    # Orbax would wait for the missing part for 20 minutes.
    results = groups.finish(group, within=60)
    assert [status for status, _, _ in results] == [1, 1]
    own, told = results[index][2], results[1 - index][2]
    failed = f"a checkpoint cannot be saved in {workdir}/checkpoints: "
    last = own.splitlines()[-1]
    assert last.startswith(f"failed: {failed}")
    assert "last good checkpoint: " in last
    assert f"failed: process {index} of 2 on {socket.gethostname()}: {failed}" in told
    assert told.splitlines()[-1].startswith(f"process {1 - index} of 2 on ")
    assert set(before) <= set(checkpoints(workdir))
    assert max(checkpoints(workdir)) < STEPS


@pytest.mark.slow
def test_first_process_killed_inside_a_save(tiny, cache, two, tmp_path):
    whole, line = two
    workdir = tmp_path / "run"
    arguments = [*tiny(workdir), *RUN]
    group = groups.start(cache, *arguments)
    pattern = "checkpoints/*.orbax-checkpoint-tmp*"
    while True:
        groups.wait_for(lambda: any(workdir.glob(pattern)), group)
        group[0].send_signal(signal.SIGSTOP)
        half = {int(path.name.partition(".")[0]) for path in workdir.glob(pattern)}
        if half - set(checkpoints(workdir)):
            break  # stopped: what is seen now is what the kill leaves
        group[0].send_signal(signal.SIGCONT)
    dies(group[0], group[1])
    complete = checkpoints(workdir)
    assert not half & set(complete)

    (first, out, err), (second, _, _) = groups.run(cache, *arguments)
    assert (first, second) == (0, 0), err
    if complete:
        assert f"continuing after step {max(complete)}" in err
    assert out.splitlines()[-1] == line
    same_end(workdir, whole)


@pytest.mark.slow
def test_process_that_hangs_is_noticed_by_its_silence(tiny, cache, tmp_path):
    """Imitates a host that lost its network: no connection breaks, and nothing arrives any more."""
    workdir = tmp_path / "run"
    group = groups.start(cache, *tiny(workdir), *RUN)
    groups.wait_for(lambda: logged_step(workdir) >= 3, group)
    group[1].send_signal(signal.SIGSTOP)
    ((status, _, err),) = groups.finish(group[:1], within=groups.HEARTBEAT + 20)
    groups.kill(group[1:])
    assert status not in (0, -signal.SIGKILL)
    last = err.splitlines()[-1]
    assert last.startswith("failed: process 0 of 2 on ")
    assert "JAX ended it because another process died or was cut off" in last
    assert "give the same command again on every host" in last


# Of the whole network rounding stays rounding where its last stages see more than one pixel, at a
# low rate.
WHOLE = (
    *RUN,
    "--config.data.image_size=32",
    "--config.model.strides=(1, 1, 2, 2, 2, 1, 1, 1)",
    "--config.schedule.base_lr=0.0005",
)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_whole_network_trains_the_same_on_any_processes(
    tiny, cache, one_whole, tmp_path, processes
):
    reference, line = one_whole
    results = groups.run(
        cache,
        *tiny(tmp_path / "run"),
        *WHOLE,
        processes=processes,
        devices=4 // processes,
        module=commands.WHOLE,
    )
    assert [status for status, _, _ in results] == [0] * processes
    as_accurate(results[0][1].splitlines()[-1], line)
    close(tmp_path / "run", reference)


@pytest.fixture(scope="module")
def one_whole(tiny, cache, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run of the whole network in one process with four devices, and its last line."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    arguments = [*tiny(workdir), *WHOLE]
    ((status, out, err),) = groups.run(
        cache, *arguments, processes=1, devices=4, module=commands.WHOLE
    )
    assert status == 0, err
    return workdir, out.splitlines()[-1]


@pytest.mark.slow
def test_goes_on_with_other_processes_and_devices(tiny, cache, two, tmp_path):
    whole, line = two
    workdir = tmp_path / "run"
    arguments = [*tiny(workdir), *RUN]
    group = groups.start(cache, *arguments)
    groups.wait_for(lambda: checkpoints(workdir), group)
    groups.kill(group)
    saved = max(checkpoints(workdir))
    ((status, out, err),) = groups.run(cache, *arguments, processes=1, devices=2)
    assert status == 0, err
    assert f"continuing after step {saved}" in err
    assert f"changed since step {saved}: devices: 4 -> 2; state, batches and" in err
    as_accurate(out.splitlines()[-1], line)
    close(workdir, whole)


@pytest.mark.slow
def test_evaluates_as_one_process(tiny, cache, two):
    whole, line = two
    arguments = [*tiny(whole), *RUN, "--mode=eval", "--config.batch_size=28"]
    (first, out, err), (second, _, _) = groups.run(cache, *arguments)
    assert (first, second) == (0, 0), err
    as_accurate(out.splitlines()[-1], line)


def test_process_that_never_comes_is_waited_for_as_long_as_the_config_says(tiny, cache, tmp_path):
    arguments = [*tiny(tmp_path / "run"), "--config.distributed.initialization_timeout=3"]
    # The one that the others meet at, and another.
    both = [groups.start(cache, *arguments, missing=[1 - alone]) for alone in (0, 1)]
    for alone, group in enumerate(both):
        ((status, _, err),) = groups.finish(group, within=60)
        assert status not in (0, -signal.SIGKILL)
        last = err.splitlines()[-1]
        assert last.startswith(f"failed: process {alone} of 2 on ")
        assert "did not meet the others at 127.0.0.1:" in last and " within 3 s " in last


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ((["--config.batch_size=48"], ["--config.batch_size=96"]), "process 1 has batch_size=96, "),
        ((["--mode=train"], ["--mode=eval"]), "process 1 has --mode='eval', process 0 'train'"),
    ],
)
def test_commands_that_differ_are_refused_everywhere(tiny, cache, tmp_path, each, message):
    for status, _, err in groups.run(cache, *tiny(tmp_path / "run"), each=each):
        assert status == 2
        assert err.splitlines()[-1].startswith("error: the processes differ in their command: ")
        assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workdir_that_is_not_shared_is_refused(tiny, cache, tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
    for status, _, err in groups.run(cache, *tiny(pathlib.Path("run")), folders=folders):
        assert status == 2
        last = err.splitlines()[-1]
        assert last.startswith("error: --workdir run is not shared: processes 1 do not see what ")
    for folder in folders:  # nothing was begun, and nothing is left behind
        assert list((folder / "run").iterdir()) == []


def test_batch_that_does_not_divide_is_refused_everywhere(tiny, cache, tmp_path):
    for status, _, err in groups.run(cache, *tiny(tmp_path / "run"), "--config.batch_size=50"):
        assert status == 2
        assert "error: batch_size 50 does not divide over 4 devices" in err


def test_error_of_one_process_ends_all_with_its_words(tiny, cache, tmp_path):
    """Here: the second host's folder for data is a file."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "data").write_text("in the way")
    (first, _, told), (second, _, own) = groups.run(
        cache, *tiny(tmp_path / "run")[:2], "--config.data.data_dir=data", folders=folders
    )
    assert second == 2
    words = own.splitlines()[-1].removeprefix("error: ")
    assert first == 1
    assert f"failed: process 1 of 2 on {socket.gethostname()}: {words}" in told
    assert not (tmp_path / "run").exists()


def test_slurm_tells_the_processes_apart(tiny, cache, tmp_path):
    """The variables that srun sets are read by jax itself."""
    # Of these ports jax takes the one that the job's number says.
    port = groups.free_port(random.sample(range(2**16 - 2**12, 2**16), 100))
    job = {
        "SLURM_JOB_ID": str(port - 2**16 + 2**12),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }
    group = [
        commands.start(
            cache,
            *tiny(tmp_path / "run"),
            env=job
            | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
            | {"JAX_ENABLE_X64": str(task)},  # refused, once they have met
        )
        for task in range(2)
    ]
    for status, _, err in groups.finish(group):
        assert status == 2
        assert "process 1 has JAX_ENABLE_X64=True, process 0 False. Install and set" in err
    # A script of sbatch is one process, though the job has more.
    alone = {name: value for name, value in job.items() if name != "SLURM_STEP_NODELIST"}
    status, _, err = commands.run(
        cache, *tiny(tmp_path / "run"), "--config.batch_size=0", env=alone | {"SLURM_PROCID": "0"}
    )
    assert status == 2 and "error: batch_size is 0" in err


HOST0 = processes.Address("10.0.0.1:1234", 2, 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (processes.Address(num_processes=2), "--num_processes=N and --process_id=I go together"),
        (
            HOST0._replace(coordinator_address="here"),
            "--coordinator_address=here: give HOST:PORT",
        ),
        (HOST0._replace(process_id=2), "--process_id=2 of --num_processes=2: processes are num"),
    ],
)
def test_addresses_that_are_not_possible_are_refused(address, message):
    refused(address, message)


def test_an_address_in_the_environment_is_a_part_of_it(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here")
    refused(processes.Address(None, 2, 0), "--coordinator_address=here: give HOST:PORT")
    # Alone it would have each host train by itself.
    refused(processes.Address(), "--num_processes=N and --process_id=I go together")


def refused(address: processes.Address, message: str) -> None:
    timeouts = default.get_config().distributed
    with (
        pytest.raises(UserError, match=re.escape(message)),
        processes.join(address, timeouts, handles_sigterm=False),
    ):
        raise AssertionError("joined")
