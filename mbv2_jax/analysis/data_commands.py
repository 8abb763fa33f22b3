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

`python -m mbv2_jax.data COMMAND --help` lists the flags of a command; `python -m mbv2_jax.analysis`
examines models.
"""

from mbv2_jax.analysis import command
from mbv2_jax.analysis.command import Command, Given


def _verify(given: Given) -> None:
    from mbv2_jax.analysis import verify

    flags = given.flags
    verify.verify(given.config, flags["split"], flags["sample"], flags["workers"])


def _browse(given: Given) -> None:
    from mbv2_jax.analysis import browse

    browse.browse(given.config, **given.flags)


COMMANDS = {
    "verify": Command(
        _verify,
        (
            command.choice(
                "split",
                "both",
                ["train", "eval", "both"],
                "train, eval or both (the default): the config's splits to check.",
            ),
            command.whole(
                "sample",
                None,
                "number of images of each split to decode, drawn with the config's seed (all).",
            ),
            command.whole(
                "workers",
                None,
                "number of processes that decode; 0 decodes in threads (as many as keep all cores "
                "busy).",
            ),
        ),
    ),
    "browse": Command(
        _browse,
        (
            command.text(
                "out", "browse.png", "file of the picture, replaced if it exists (browse.png)."
            ),
            command.whole("count", 32, "number of images to show (32)."),
            command.whole("epoch", 0, "epoch whose first images to show (0)."),
            command.number(
                "seconds", 10.0, "time to measure the rate (10); 0 does not measure it."
            ),
            command.number(
                "needs",
                None,
                "images per second that the accelerator takes, for a machine that has none.",
            ),
        ),
    ),
}


def main() -> None:
    """Parses the command line, and calls `verify` or `browse`."""
    command.main(__doc__, COMMANDS)
