"""The settings that a run on CPUs makes for itself, and no others."""

import os
import pathlib
import sys

import jax
import pytest

from mbv2_jax.runtime import cpu
from tests.support import commands

HUGE = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't have them")
def test_training_starts_again_with_huge_pages_and_nothing_else_does(tmp_path):
    given = "[madvise]" in pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    # Refused, but only after that.
    mistake = ("--config=digits", f"--workdir={tmp_path / 'run'}", "--config.batch_size=0")
    for mode, expected in (("train", given), ("eval", False)):
        status, _, err = commands.run(None, *mistake, f"--mode={mode}", module=commands.WHOLE)
        assert status == 2
        assert err.count(HUGE) == expected
        assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("batch_size", "group_size", "cores", "devices"),
    [
        (32, 0, 2, 2),
        (32, 32, 64, 4),  # 8 images or more on each
        (30, 0, 4, 3),  # a divisor
        (96, 32, 2, 1),  # 3 groups have no place on 2
        (96, 32, 64, 12),
        (256, 32, 6, 4),
        (7, 0, 4, 1),
        (32, "device", 2, None),
        (0, 0, 2, 1),  # refused elsewhere
        (32, 64, 2, 2),
    ],
)
def test_devices_divide_the_batch_and_its_groups(
    batch_size, group_size, cores, devices, monkeypatch
):
    asked: dict[str, int] = {}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    monkeypatch.setenv("XLA_FLAGS", "")
    cpu.use_cores(batch_size, group_size)
    assert asked.get("jax_num_cpu_devices") == devices


def test_what_the_user_set_stays(monkeypatch):
    def unwanted(*_):
        raise AssertionError("started again")

    monkeypatch.setattr(os, "execve", unwanted)
    monkeypatch.setattr(cpu, "_mode", lambda: "always [madvise] never\n")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    cpu.use_huge_pages()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    cpu.use_huge_pages()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(AssertionError, match="started again"):
        cpu.use_huge_pages()
