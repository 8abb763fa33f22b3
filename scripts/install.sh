#!/bin/sh
# Installs locked packages into a virtual environment: scripts/install.sh VENV LOCK [OPTION...]
#
# Options: --project  this package as well, editable
#          --peers    the packages of requirements/peers.txt as well
set -eu
venv=$1
lock=$2
shift 2

pip() {  # its progress is for a person; a log gets its complaints only
    command=$1
    shift
    test -t 1 || set -- --quiet "$@"
    "$venv/bin/python" -m pip "$command" --no-compile --disable-pip-version-check "$@"
}

# torch comes with what it needs (for a CUDA build that is a lot), but changes no locked version. The
# others ask for packages that would (opencv with a GUI), so they come without dependencies.
install_peers() {
    pins="$venv/lock-pins.txt"
    sed -n 's/^\([a-z][^\\]*==[^\\]*\).*/\1/p' "$lock" > "$pins"  # without the hashes
    pip install -c "$pins" -c requirements/peers.txt "$(grep '^torch==' requirements/peers.txt)"
    pip install --no-deps -c "$pins" -r requirements/peers.txt
}

# setuptools comes first and from its own lock, so that nothing is built with a version that pip
# picks: one package (promise) has no wheel, and this project is installed from its source.
pip install --require-hashes -r requirements/build.txt
pip install --require-hashes --no-build-isolation --use-pep517 -r "$lock"
for option in "$@"; do
    case $option in
        --project) pip install --no-deps --no-build-isolation --editable . ;;
        --peers) install_peers ;;
        *) echo "error: unknown option $option" >&2; exit 2 ;;
    esac
done

# pip would compile on one core. Some files are templates, or for other versions of Python.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
