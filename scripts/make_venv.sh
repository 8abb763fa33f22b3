#!/bin/sh
# Makes a virtual environment with the first usable Python: scripts/make_venv.sh FOLDER PYTHON...
set -eu
folder=$1
shift

# A pyenv shim may exist and fail, and Debian's Python may lack its venv module.
for python in "$@"; do
    "$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
        2>/dev/null || continue
    echo "making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder" && exit 0
    rm -rf "$folder"
    exit 1
done

echo "error: no usable Python: tried $*." >&2
echo '  Needed: Python 3.11 to 3.14 with its venv module (Debian, Ubuntu: package python3-venv).' >&2
echo '  Name one: make PYTHON=/path/to/python' >&2
exit 1
