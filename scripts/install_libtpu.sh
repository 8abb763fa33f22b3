#!/bin/sh
# Installs the libtpu that the installed jax asks for: scripts/install_libtpu.sh VENV
set -eu
version=$("$1/bin/python" -c '
import importlib.metadata

requirements = importlib.metadata.requires("jax")
print(next(r.split(";")[0] for r in requirements if r.startswith("libtpu")))')
"$1/bin/python" -m pip install --no-deps --disable-pip-version-check --quiet "$version"
