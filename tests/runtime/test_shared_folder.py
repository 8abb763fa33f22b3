"""Which processes see a folder; tests/runtime/test_processes.py has runs of several."""

import dataclasses
from typing import Any

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.runtime import processes, shared_folder
from mbv2_jax.runtime.processes import Group


@dataclasses.dataclass(frozen=True)
class OfThree(Group):
    """One of three processes, of which those in `blind` see nothing."""

    index: int = 0
    count: int = 3
    blind: tuple[int, ...] = ()

    def exchange(self, name: str, value: Any) -> list[Any]:
        if name.startswith("view"):
            return [value and process not in self.blind for process in range(self.count)]
        return [value] * self.count


def test_processes_that_do_not_see_the_folder_are_named(tmp_path):
    assert shared_folder.unseeing(tmp_path, "folder", processes.single()) == []
    assert shared_folder.unseeing(tmp_path, "folder", OfThree()) == []
    assert shared_folder.unseeing(tmp_path, "folder", OfThree(blind=(1, 2))) == [1, 2]
    shared_folder.check_shared(tmp_path, OfThree())
    with pytest.raises(UserError, match=r"--workdir .* is not shared: processes 1; 2 do not see"):
        shared_folder.check_shared(tmp_path, OfThree(blind=(1, 2)))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_does_not_come_into_view_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "_VISIBLE_WITHIN", 0.1)
    (tmp_path / "seen").touch()
    shared_folder.check_seen(tmp_path, "seen", OfThree())
    with pytest.raises(UserError, match="processes 0; 1; 2 do not see"):
        shared_folder.check_seen(tmp_path, "unseen", OfThree())
