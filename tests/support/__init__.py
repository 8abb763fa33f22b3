"""Code that several test modules share."""

import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
