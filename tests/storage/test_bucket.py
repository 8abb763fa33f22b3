"""gs:// without training: the lease, model directories, and what is said of what is wrong."""

import os
import pathlib
import shutil
import sys
import time

import fsspec
import gcsfs
import jax
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.path import gcs_utils

from mbv2_jax import model_dir
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.storage import atomic, bucket, mirror
from mbv2_jax.storage.lease import Lease
from mbv2_jax.training import checkpoint
from tests.support import fake_gcs, tiny_model


def forget() -> None:
    """Clears the libraries' memory of a server: other tests have another one, or none."""
    bucket._bucket.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="module")
def server():
    bucket._configure_libraries()
    with fake_gcs.Server("bucket", "private") as server, pytest.MonkeyPatch.context() as patch:
        server.forbidden.add("private")
        for name, value in server.environment.items():
            patch.setenv(name, value)
        for protocol in ("gs", "gcs"):  # another test has its own
            fsspec.register_implementation(protocol, gcsfs.GCSFileSystem, clobber=True)
        forget()
        yield server
    forget()


def workdir(name: str) -> pathlib.Path:
    return bucket.parse_path(f"gs://bucket/{name}", "--workdir")


def lease(name: str, lifetime: float = 1.0) -> Lease:
    return Lease(workdir(name), interval=0.1, lifetime=lifetime)


def test_a_second_run_is_refused_while_the_first_lives(server, capsys):
    with lease("lives", lifetime=30) as first:
        start = time.monotonic()
        with pytest.raises(UserError, match="another run is at work in gs://bucket/lives"):
            lease("lives", lifetime=30).__enter__()
        assert time.monotonic() - start < 15  # a sign of life is enough
        first.check()
        assert f"process {os.getpid()}" in capsys.readouterr().err
    assert not server.names("bucket", "lives")
    with lease("lives") as second:  # given back: nothing to wait for
        second.check()


def test_the_lease_of_a_killed_run_is_taken_over_and_the_killed_run_stops_if_it_wakes(server):
    asleep = lease("sleeps")
    asleep._acquire()  # and no sign of life after that
    with lease("sleeps") as second:
        second.check()
        with pytest.raises(RunFailed, match="another run took over gs://bucket/sleeps "):
            asleep.check()
        asleep._thread.start()  # it wakes: what it does then must not cost the other its lease
        time.sleep(0.5)
        asleep.__exit__()
        second.check()


def test_a_lease_whose_answer_was_lost_is_not_taken_for_another_runs(server, monkeypatch):
    from google.api_core import exceptions

    one = lease("lost", lifetime=3600)
    write = one._write

    def unheard() -> None:
        generation = one._generation
        write()
        one._generation = generation
        monkeypatch.setattr(one, "_write", write)
        raise exceptions.PreconditionFailed("of the second attempt of the library")

    monkeypatch.setattr(one, "_write", unheard)
    start = time.monotonic()
    with one:
        one.check()
    assert time.monotonic() - start < 5
    assert not server.names("bucket", "lost")


def test_a_lease_that_was_written_long_ago_costs_no_time(server):
    lease("old", lifetime=3600)._acquire()
    server.age("bucket", "old/.lock", 3601)
    start = time.monotonic()
    with lease("old", lifetime=3600) as second:
        second.check()
    assert time.monotonic() - start < 5


def test_an_object_is_written_complete_or_not_at_all(server):
    path = workdir("atomic/lines")
    with pytest.raises(TypeError), atomic.open_file(path) as file:
        file.writelines(["new", 1])
    assert not server.names("bucket", "atomic")
    with atomic.open_file(path) as file:
        file.writelines(["ä\n", "b\n"])
    assert server.read("bucket", "atomic/lines") == "ä\nb\n".encode()
    with pytest.raises(UserError, match="--out=gs://bucket/atomic/lines exists already"):
        atomic.check_writable(path, "--out")


def test_a_folder_in_a_bucket_loses_its_mark_first(server):
    for name in ("old", "mark"):
        server.put("bucket", f"replaced/{name}", b"")
    with atomic.replace_folder(workdir("replaced"), mark="mark") as folder:
        assert not server.names("bucket", "replaced")
        for name in ("new", "mark"):
            (folder / name).write_text("")
    assert server.names("bucket", "replaced") == ["replaced/mark", "replaced/new"]


def test_a_model_is_written_and_read_bit_for_bit_and_replaced(server, tmp_path):
    path = workdir("models/tiny")
    for seed in (0, 1):
        model_dir.write(path, **tiny_model.variables(seed), description=tiny_model.DESCRIPTION)
        found = model_dir.read("gs://bucket/models/tiny")
        here = model_dir.read(tiny_model.write(tmp_path / str(seed), seed))
        for ours, theirs in ((found.params, here.params), (found.batch_stats, here.batch_stats)):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert found.description == here.description
    # Copied to a disk it is the same model directory.
    copy = server.download("bucket", "models/tiny/", tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, model_dir.read(copy).params, found.params)


def test_a_model_whose_writing_was_interrupted_is_none(server, monkeypatch):
    path = workdir("models/cut")
    model_dir.write(path, **tiny_model.variables(0), description=tiny_model.DESCRIPTION)

    def dies(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_dir, "_sha256", dies)  # arrays are there, model.json is not yet
    with pytest.raises(KeyboardInterrupt):
        model_dir.write(path, **tiny_model.variables(1), description=tiny_model.DESCRIPTION)
    monkeypatch.undo()
    with pytest.raises(UserError, match="gs://bucket/models/cut is neither a model directory"):
        model_dir.read("gs://bucket/models/cut")


def test_damaged_arrays_in_a_bucket_are_noticed(server):
    model_dir.write(
        workdir("models/bad"), **tiny_model.variables(0), description=tiny_model.DESCRIPTION
    )
    name = max(
        server.names("bucket", "models/bad/arrays/"),
        key=lambda name: len(server.read("bucket", name)),
    )
    data = bytearray(server.read("bucket", name))
    data[len(data) // 2] ^= 1
    server.put("bucket", name, bytes(data))
    with pytest.raises(UserError, match="by their SHA-256"):
        model_dir.read("gs://bucket/models/bad")


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(server):
    """Else a network that fails would have good checkpoints set aside."""
    name = "unreadable/checkpoints/1/config/metadata"
    server.put("bucket", name, b"{}")
    assert set(checkpoint.newest_faults(workdir("unreadable"), [1])) == {1}  # it lacks the rest
    server.unreadable.add(name)
    with pytest.raises(RunFailed, match=r"1 cannot be read now: .*not now.* is lost"):
        checkpoint.newest_faults(workdir("unreadable"), [1])


def test_a_tree_is_moved_with_its_marks_first(server):
    for name in ("a", "commit_success.txt", "state/b", "state/commit_success.txt"):
        server.put("bucket", f"from/tree/{name}", name.encode())
    server.put("bucket", "from/treetop", b"not of it")
    bucket.move_tree(workdir("from/tree"), workdir("to/tree"))
    assert server.names("bucket", "from/") == ["from/treetop"]
    names = server.names("bucket", "to/")
    moved = {server.objects["bucket", name].generation: name for name in names}
    assert [moved[when].removeprefix("to/tree/") for when in sorted(moved)] == [
        "commit_success.txt", "state/commit_success.txt", "a", "state/b",
    ]  # fmt: skip
    assert server.read("bucket", "to/tree/state/b") == b"state/b"


def test_logs_are_copied_when_they_changed_and_only_while_the_workdir_is_ours(server):
    server.put("bucket", "logs/metrics.jsonl", b"old\n")
    ours = True

    def check():
        if not ours:
            raise RunFailed("another run took over")

    logs = mirror.Mirror(workdir("logs"), check)
    lines = logs.folder / "metrics.jsonl"
    assert lines.read_text() == "old\n"  # what was logged before
    with lines.open("a") as file:
        file.write("new\n")
    (logs.folder / "tensorboard").mkdir()
    (logs.folder / "tensorboard" / "events").write_bytes(b"x")
    logs.copy()
    assert server.read("bucket", "logs/metrics.jsonl") == b"old\nnew\n"
    assert server.read("bucket", "logs/tensorboard/events") == b"x"
    generation = server.objects["bucket", "logs/tensorboard/events"].generation
    lines.write_text("another's\n")
    ours = False
    with pytest.raises(RunFailed, match="took over"):
        logs.close()
    assert server.read("bucket", "logs/metrics.jsonl") == b"old\nnew\n"
    assert server.objects["bucket", "logs/tensorboard/events"].generation == generation
    assert not logs.folder.exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://nowhere/run", "there is no bucket gs://nowhere"),
        ("gs://private/run", "no permission for gs://private. It needs the roles Storage Object"),
        ("gs://bucket", "give a folder in a bucket, gs://BUCKET/FOLDER"),
        ("gs:///run", "give a folder in a bucket, gs://BUCKET/FOLDER"),
        ("s3://bucket/run", "give a folder on a disk, or gs://BUCKET/FOLDER"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_in_a_line(server, address, said):
    with pytest.raises(UserError) as error:
        bucket.parse_path(address, "--workdir")
    assert str(error.value).startswith(f"--workdir={address}: {said}")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_told_with_the_extra_that_brings_it(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs gcsfs, .* pip install '\.\[gcs\]'"):
        bucket.parse_path("gs://bucket/run", "--workdir")


def test_missing_credentials_are_told_with_where_they_come_from(server, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")  # Google's own then, but nobody gets that far
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda *_: None)  # no gcloud
    with pytest.raises(UserError, match="no Google Cloud credentials were found: run `gcloud auth"):
        bucket.parse_path("gs://another/run", "--workdir")
