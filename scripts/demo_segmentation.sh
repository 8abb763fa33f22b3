#!/bin/sh
# Trains Mobile DeepLabv3 on scenes of digits, evaluates and predicts:
# scripts/demo_segmentation.sh PYTHON WORKDIR
#
# Run again, it finds the training finished, and only evaluates and predicts.
set -eu
python=$1
workdir=$2

run() {
    echo "$python -m $*"
    "$python" -m "$@"
}

run mbv2_jax.main --config=digit_scenes_segmentation --workdir="$workdir"
run mbv2_jax.main --config=digit_scenes_segmentation --mode=eval --checkpoint="$workdir" \
    > "$workdir/eval.txt" || { cat "$workdir/eval.txt"; exit 1; }
cat "$workdir/eval.txt"
"$python" - "$workdir/eval.txt" << 'END'
import json, sys

miou = json.loads(open(sys.argv[1]).readlines()[-1])["mIoU"]
sys.exit(0 if miou >= 70 else f"demo failed: mIoU is {miou:.2f} %, expected 70 % or more")
END
rm -rf "$workdir/masks" "$workdir/shown"
run mbv2_jax.data.digits --export="$workdir/scenes" --scenes
run mbv2_jax.predict "$workdir"/scenes/test/images --checkpoint="$workdir" \
    --out-dir="$workdir/masks" --show-dir="$workdir/shown"
echo "The scenes under their predicted masks: $workdir/shown/; the curves: $workdir/curves.png"
