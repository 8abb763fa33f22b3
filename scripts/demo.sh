#!/bin/sh
# Trains on handwritten digits, evaluates and predicts: scripts/demo.sh PYTHON WORKDIR
#
# Run again, it finds the training finished, and only evaluates and predicts.
set -eu
python=$1
workdir=$2

run() {
    echo "$python -m $*"
    "$python" -m "$@"
}

run mbv2_jax.main --config=configs/digits.py --workdir="$workdir"
run mbv2_jax.main --config=configs/digits.py --mode=eval --checkpoint="$workdir" \
    > "$workdir/eval.txt" || { cat "$workdir/eval.txt"; exit 1; }
cat "$workdir/eval.txt"
"$python" - "$workdir/eval.txt" << 'END'
import json, sys

top1 = json.loads(open(sys.argv[1]).readlines()[-1])["top1"]
sys.exit(0 if top1 >= 97 else f"demo failed: top-1 is {top1:.2f} %, expected 97 % or more")
END
run mbv2_jax.data.digits --export="$workdir/images"
run mbv2_jax.predict "$workdir"/images/*.png --checkpoint="$workdir"
echo "The curves of loss, accuracy and learning rate: $workdir/curves.png"
