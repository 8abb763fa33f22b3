#!/bin/sh
# Trains on handwritten digits, evaluates and predicts: scripts/demo.sh PYTHON WORKDIR CONFIG
#
# CONFIG is digits, digit_scenes_segmentation or digit_scenes_detection. Run again, it finds the
# training finished, and only evaluates and predicts.
set -eu
python=$1
workdir=$2
config=$3

run() {
    echo "$python -m $*"
    "$python" -m "$@"
}

# Fails unless the metric $1, in per cent, is at least $2.
expect() {
    "$python" - "$workdir/eval.txt" "$1" "$2" << 'END'
import json, sys

file, metric, least = sys.argv[1:]
value = json.loads(open(file).readlines()[-1])[metric]
if value < float(least):
    sys.exit(f"demo failed: {metric} is {value:.2f} %, expected {least} % or more")
END
}

run mbv2_jax.main --config="$config" --workdir="$workdir"
run mbv2_jax.main --config="$config" --mode=eval --checkpoint="$workdir" \
    > "$workdir/eval.txt" || { cat "$workdir/eval.txt"; exit 1; }
cat "$workdir/eval.txt"
rm -rf "$workdir/masks" "$workdir/shown"
case $config in
digits)
    expect top1 97
    run mbv2_jax.data.digits --export="$workdir/images"
    run mbv2_jax.predict "$workdir"/images/*.png --checkpoint="$workdir"
    ;;
digit_scenes_segmentation)
    expect mIoU 70
    run mbv2_jax.data.digits --export="$workdir/scenes" --scenes
    run mbv2_jax.predict "$workdir"/scenes/test/images --checkpoint="$workdir" \
        --out-dir="$workdir/masks" --show-dir="$workdir/shown"
    echo "The scenes under their predicted masks: $workdir/shown/"
    ;;
digit_scenes_detection)
    expect mAP50 60
    run mbv2_jax.data.digits --export="$workdir/scenes" --scenes=yolo
    run mbv2_jax.predict "$workdir"/scenes/images/val --checkpoint="$workdir" --score=0.5 \
        --show-dir="$workdir/shown"
    echo "The scenes with the boxes that were found: $workdir/shown/"
    ;;
esac
echo "The curves: $workdir/curves.png"
