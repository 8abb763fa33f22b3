"""python -m mbv2_jax.data: look at a config's data before training on it.

Commands:
  verify   count the examples, decode them, and name every bad record
  browse   draw the images that training will see, and measure how fast they come

Examples:
  Is this copy of ImageNet whole? (The last line printed is JSON; the exit status is 1 if not.)
    python -m mbv2_jax.data verify --config=mobilenet_v2_8xb32_in1k
  A thousand random photos of each split of one's own:
    python -m mbv2_jax.data verify --config=finetune_folder --sample=1000 \\
        --config.data.source=folder:PHOTOS
  What does training see in epoch 5, and do 16 workers keep up with the accelerator?
    python -m mbv2_jax.data browse --config=mobilenet_v2_8xb32_in1k --epoch=5 \\
        --config.data.workers=16

`python -m mbv2_jax.data COMMAND --help` lists the flags of a command.
"""

import sys

from absl import flags

from mbv2_jax import command_line
from mbv2_jax.errors import UserError, nearest

_CONFIG = (
    "\nConfig:\n  --config=FILE.py[:ARG] or --config=NAME[:ARG] of an installed recipe\n"
    "  --config.KEY=VALUE changes one field, e.g. --config.data.data_dir=/data/tfds"
)

VERIFY = flags.FlagValues()
flags.DEFINE_enum(
    "split",
    "both",
    ["train", "eval", "both"],
    "train, eval or both (the default) of the config's splits.",
    flag_values=VERIFY,
)
flags.DEFINE_integer(
    "sample",
    None,
    "N images of each split, drawn with the config's seed, instead of all.",
    flag_values=VERIFY,
)
flags.DEFINE_integer(
    "workers",
    None,
    "N processes that decode; 0: threads. By default what keeps all cores busy.",
    flag_values=VERIFY,
)

BROWSE = flags.FlagValues()
flags.DEFINE_string(
    "out", "browse.png", "FILE.png of the picture (browse.png); replaced.", flag_values=BROWSE
)
flags.DEFINE_integer("count", 32, "how many images to show (32).", flag_values=BROWSE)
flags.DEFINE_integer("epoch", 0, "the epoch whose first images to show (0).", flag_values=BROWSE)
flags.DEFINE_float(
    "seconds", 10.0, "how long to measure the rate (10); 0: not at all.", flag_values=BROWSE
)
flags.DEFINE_float(
    "needs",
    None,
    "images per second that the accelerator takes, to compare with where there is none here.",
    flag_values=BROWSE,
)


COMMANDS = {"verify": VERIFY, "browse": BROWSE}


def main() -> None:
    """Parses the command line and makes one call."""
    if not sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        raise UserError(f"a command is missing: {' or '.join(COMMANDS)}")
    command, *arguments = sys.argv[1:]
    if command in ("--help", "-h", "-help", "--helpfull", "--helpshort"):
        print(__doc__.rstrip())
        return
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}: {nearest(command, COMMANDS)}")
    values = COMMANDS[command]
    config = command_line.parse(values, [sys.argv[0], *arguments], __doc__ + _CONFIG)

    if command == "verify":  # imported here: Grain and jax take seconds, --help needs none
        from mbv2_jax.analysis import verify

        verify.verify(config, values.split, values.sample, values.workers)
    else:
        from mbv2_jax.analysis import browse

        browse.browse(
            config,
            values.out,
            count=values.count,
            epoch=values.epoch,
            seconds=values.seconds,
            needs=values.needs,
        )


if __name__ == "__main__":
    command_line.run(main)
