"""Helpers of the tests."""

import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
