"""Runs `python -m convert` in this process."""

import sys

import pytest

from mbv2_jax import command_line
from mbv2_jax.convert import __main__ as convert


def make_run(monkeypatch, capsys):
    """Returns a function that runs the command and returns its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.run(convert.main)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def refused(outcome: tuple[int, str, str]) -> str:
    """Returns the error line of a command that refused its arguments, its only output."""
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
