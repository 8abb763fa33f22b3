"""Files and folders that are complete, or not there at all."""

import json
import os
import pathlib
import stat

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.storage import atomic


def test_files_are_written_and_replaced(tmp_path):
    file = tmp_path / "config.json"
    for value in ({"a": [1, 2]}, {"b": "ä"}):
        atomic.write_json(file, value)
        assert json.loads(file.read_text(encoding="utf-8")) == value
    atomic.write_text(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    atomic.write_bytes(file, b"\r\n")
    assert file.read_bytes() == b"\r\n"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    atomic.write_text(tmp_path / "file", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "file")}
    assert len(modes) == 1


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(TypeError), atomic.open_file(file) as stream:
        stream.writelines(["new", 1])
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with atomic.open_file(file) as stream:
        stream.write("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_the_file_that_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("file")
    atomic.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    file = tmp_path / "no" / "file"
    with pytest.raises(FileNotFoundError) as error:
        atomic.write_text(file, "text")
    assert error.value.filename == str(file)
    assert error.value.strerror == "No such file or directory"
    # An error of reading something else keeps that file's name.
    with pytest.raises(FileNotFoundError) as error, atomic.open_file(tmp_path / "copy") as stream:
        stream.write((tmp_path / "source").read_text())
    assert error.value.filename == str(tmp_path / "source")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "models" / "model"
    for name in ("first", "second"):
        with atomic.replace_folder(path, mark="mark") as folder:
            assert list(folder.iterdir()) == []
            (folder / name).touch()
            (folder / "mark").touch()
    assert sorted(os.listdir(path)) == ["mark", "second"]
    with (
        pytest.raises(FileExistsError),
        atomic.replace_folder(path, mark="mark") as folder,
    ):
        (folder / "third" / "..").mkdir(parents=True)
    assert sorted(os.listdir(path)) == ["mark", "second"]
    assert os.listdir(path.parent) == ["model"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", r"--out=.*/file exists already: delete it, or give another name"),
        ("no/out", "cannot be written: No such file"),
        ("file/out", "cannot be written: Not a directory"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        atomic.check_writable(tmp_path / name, "--out")
    atomic.check_writable(tmp_path / "new", "--out")
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_without_space_is_an_error_with_its_folder(tmp_path):
    atomic.check_space(tmp_path, 1000)
    with pytest.raises(OSError, match="No space left on device") as error:
        atomic.check_space(tmp_path, 2**60)
    assert pathlib.Path(error.value.filename) == tmp_path
