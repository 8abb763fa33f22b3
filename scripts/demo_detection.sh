#!/bin/sh
# Trains SSDLite on scenes of digits, evaluates and predicts:
# scripts/demo_detection.sh PYTHON WORKDIR
#
# Run again, it finds the training finished, and only evaluates and predicts.
set -eu
python=$1
workdir=$2

run() {
    echo "$python -m $*"
    "$python" -m "$@"
}

run mbv2_jax.main --config=digit_scenes_detection --workdir="$workdir"
run mbv2_jax.main --config=digit_scenes_detection --mode=eval --checkpoint="$workdir" \
    > "$workdir/eval.txt" || { cat "$workdir/eval.txt"; exit 1; }
cat "$workdir/eval.txt"
"$python" - "$workdir/eval.txt" << 'END'
import json, sys

precision = json.loads(open(sys.argv[1]).readlines()[-1])["mAP50"]
sys.exit(0 if precision >= 60 else f"demo failed: mAP50 is {precision:.2f} %, expected 60 % or more")
END
rm -rf "$workdir/shown"
run mbv2_jax.data.digits --export="$workdir/scenes" --scenes=yolo
run mbv2_jax.predict "$workdir"/scenes/images/val --checkpoint="$workdir" --score=0.5 \
    --show-dir="$workdir/shown"
echo "The scenes with the boxes that were found: $workdir/shown/; the curves: $workdir/curves.png"
