"""Comparing values between processes; here without the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.runtime import processes
from mbv2_jax.runtime.processes import Group


@dataclasses.dataclass(frozen=True)
class FirstOfTwo(Group):
    """Process 0 of two, of which the other one has the values `other`."""

    index: int = 0
    count: int = 2
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def exchange(self, name: str, value: Any) -> list[Any]:
        return [value, "its digest" if "SHA-256" in name else self.other]


def test_a_single_process_has_its_own_values():
    group = processes.single()
    assert (group.index, group.count) == (0, 1)
    assert group.exchange("value", {"a": 1}) == [{"a": 1}]
    group.check_same("values", {"a": 1}, "no remedy")


def test_values_that_differ_are_all_named():
    group = FirstOfTwo(other={"a": 1, "b": 3})
    message = (
        r"^the processes differ in their settings: process 1 has b=3, process 0 2; "
        r"process 1 has c=None, process 0 4\. Set the same$"
    )
    with pytest.raises(UserError, match=message):
        group.check_same("settings", {"a": 1, "b": 2, "c": 4}, "Set the same")
