"""python -m mbv2_jax.data: examine a config's data before training on it.

Commands:
  verify   count the examples, decode them, and name every bad record
  browse   draw the images that training will see, and measure the rate of the input

Examples:
  Check that a copy of ImageNet is complete. (The last line printed is JSON; the exit status is 1 if
  it is not.)
    python -m mbv2_jax.data verify --config=mobilenet_v2_8xb32_in1k
  Check a thousand random photos of each split of your own data:
    python -m mbv2_jax.data verify --config=finetune_folder --sample=1000 \\
        --config.data.source=folder:PHOTOS
  See the images of epoch 5, and whether 16 workers keep up with the accelerator:
    python -m mbv2_jax.data browse --config=mobilenet_v2_8xb32_in1k --epoch=5 \\
        --config.data.workers=16

`python -m mbv2_jax.data COMMAND --help` lists the flags of a command.
"""

import sys

from absl import flags
from ml_collections import ConfigDict

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
    "train, eval or both (the default): the config's splits to check.",
    flag_values=VERIFY,
)
flags.DEFINE_integer(
    "sample",
    None,
    "number of images of each split to decode, drawn with the config's seed (all).",
    flag_values=VERIFY,
)
flags.DEFINE_integer(
    "workers",
    None,
    "number of processes that decode; 0 decodes in threads (as many as keep all cores busy).",
    flag_values=VERIFY,
)

BROWSE = flags.FlagValues()
flags.DEFINE_string(
    "out",
    "browse.png",
    "file of the picture, replaced if it exists (browse.png).",
    flag_values=BROWSE,
)
flags.DEFINE_integer("count", 32, "number of images to show (32).", flag_values=BROWSE)
flags.DEFINE_integer("epoch", 0, "epoch whose first images to show (0).", flag_values=BROWSE)
flags.DEFINE_float(
    "seconds", 10.0, "time to measure the rate (10); 0 does not measure it.", flag_values=BROWSE
)
flags.DEFINE_float(
    "needs",
    None,
    "images per second that the accelerator takes, for a machine that has none.",
    flag_values=BROWSE,
)


# Both commands import their module when they run: Grain and jax take seconds, and --help needs
# neither.


def _verify(config: ConfigDict) -> None:
    from mbv2_jax.analysis import verify

    verify.verify(config, VERIFY.split, VERIFY.sample, VERIFY.workers)


def _browse(config: ConfigDict) -> None:
    from mbv2_jax.analysis import browse

    browse.browse(
        config,
        BROWSE.out,
        count=BROWSE.count,
        epoch=BROWSE.epoch,
        seconds=BROWSE.seconds,
        needs=BROWSE.needs,
    )


COMMANDS = {"verify": (VERIFY, _verify), "browse": (BROWSE, _browse)}


def main() -> None:
    """Parses the command line, and calls `verify` or `browse`."""
    if not sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        raise UserError(f"a command is missing: {' or '.join(COMMANDS)}")
    command, *arguments = sys.argv[1:]
    if command in ("--help", "-h", "-help", "--helpfull", "--helpshort"):
        print(__doc__.rstrip())
        return
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}: {nearest(command, COMMANDS)}")
    values, call = COMMANDS[command]
    call(command_line.parse(values, [sys.argv[0], *arguments], __doc__ + _CONFIG))
