#!/bin/sh
# Trains on handwritten digits and serves a page that knows them: demo_web.sh PYTHON WORKDIR PAGE PORT
#
# Run again, it finds the training finished, and only writes the page anew.
set -eu
python=$1
workdir=$2
page=$3
port=$4

run() {
    echo "$python -m $*"
    "$python" -m "$@"
}

run mbv2_jax.main --config=digits --workdir="$workdir"
run mbv2_jax.data.digits --export="$workdir/images"
run mbv2_jax.export "$workdir" --to=web --output="$page" --force --check "$workdir/images"
echo "Open http://localhost:$port and drop a picture of $workdir/images on the page; Ctrl-C ends."
run http.server --bind 127.0.0.1 --directory "$page" "$port"
