#!/bin/sh
# Compiles the locks in requirements/: scripts/compile_locks.sh UV [OPTION...]
#
# Each serves every supported Python and platform. uv reads and writes the same file: every version
# that still fits stays, unless an option such as --upgrade says otherwise.
set -eu
uv=$1
shift

compile() {
    name=$1
    shift
    echo "requirements/$name.txt"
    "$uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
        --custom-compile-command 'make lock' -o "requirements/$name.txt" "$@"
}

compile build requirements/build.in "$@"
compile tensorflow requirements/tensorflow.in "$@"
compile lock setup.cfg --extra demo --extra fast --extra test "$@"
compile docs setup.cfg --extra docs -c requirements/lock.txt "$@"
# A part of the lock, which decides the versions.
compile light requirements/light.in --no-deps --no-annotate -c requirements/lock.txt
