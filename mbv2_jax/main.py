"""python -m mbv2_jax.main: train and evaluate MobileNetV2, or print what it costs.

Examples:
  Train the demo (handwritten digits, a CPU is enough); the same command again continues it:
    python -m mbv2_jax.main --config=configs/digits.py --workdir=runs/digits
  Evaluate what was trained; the last line printed is JSON:
    python -m mbv2_jax.main --config=configs/digits.py --mode=eval --checkpoint=runs/digits
  Change any field of the config (configs/default.py explains every one):
    python -m mbv2_jax.main --config=digits --workdir=runs/narrow --config.model.width=0.25
  Fine-tune on folders of your own photos, train/CLASS/*.jpg and val/CLASS/*.jpg:
    python -m mbv2_jax.main --config=configs/finetune_folder.py --workdir=runs/mine \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/digits
  Parameters and multiply-adds, layer by layer:
    python -m mbv2_jax.main --config=configs/mobilenet_v2_8xb32_in1k.py --mode=info
"""

import json
import sys

from absl import flags

from mbv2_jax import command_line

# Flags of our own, not absl's global ones: --help shows these and nothing else.
FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "workdir",
    None,
    "DIR of a run: checkpoints, logs, curves, model. Training goes on from the newest checkpoint.",
    flag_values=FLAGS,
)
_MODES = ["train", "eval", "info"]
flags.DEFINE_enum(
    "mode", "train", _MODES, "what to do; eval takes --checkpoint or --workdir.", flag_values=FLAGS
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "PATH of a model directory or a workdir: what eval evaluates; where train gets its first "
    "weights, unless --workdir already holds a checkpoint.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "expect",
    None,
    "TOP1,TOP5: percentages that the evaluation should reach within 0.05; exits with 1 if not.",
    flag_values=FLAGS,
)
USAGE = __doc__ + (
    "\nConfig:\n  --config=FILE.py[:ARG] or --config=NAME[:ARG] of an installed recipe\n"
    "  --config.KEY=VALUE changes one field, e.g. --config.schedule.base_lr=0.1"
)


def main() -> None:
    """Parses the command line and makes one call."""
    config = command_line.parse(FLAGS, sys.argv, USAGE)
    overrides = command_line.overrides(FLAGS)
    expected = command_line.two_percentages("--expect", FLAGS.expect) if FLAGS.expect else None

    from mbv2_jax.training import evaluation, loop  # here: jax takes seconds, --help needs none

    if FLAGS.mode == "info":
        print(loop.info(config))
        return
    if FLAGS.mode == "train":
        result = loop.train(config, FLAGS.workdir, FLAGS.checkpoint)
    else:
        result = evaluation.evaluate(config, FLAGS.checkpoint or FLAGS.workdir, overrides)
    if result is not None:
        print(json.dumps(result), flush=True)
        if expected is not None:
            evaluation.check_expected(result, *expected)


if __name__ == "__main__":
    command_line.run(main)
