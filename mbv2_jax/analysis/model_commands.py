"""python -m mbv2_jax.analysis: look at a model, at its mistakes, and at a config's schedule.

Commands:
  report     evaluate once: confusion matrix, precision, recall, F1 of each class, worst mistakes,
             least certain images and calibration, as tables and pictures in a folder
  cam        class activation maps: the parts of photos that support a class
  embedding  the images of a split on a plane, near each other where the model sees them alike
  schedule   the learning rate over the steps of a run, before it starts

Examples:
  Report on a model of yours, on the evaluation split of its photos:
    python -m mbv2_jax.analysis report --checkpoint=runs/mine --config=finetune_folder \\
        --config.data.source=folder:PHOTOS --out=report
  See which parts of photos support the class that the model predicts, or another class:
    python -m mbv2_jax.analysis cam frog.jpg photos/ --checkpoint=runs/mine --out=cam
    python -m mbv2_jax.analysis cam frog.jpg --checkpoint=mmpretrain --class=bullfrog --layer=layer5
  See whether ImageNet's features already separate the classes of your photos:
    python -m mbv2_jax.analysis embedding --checkpoint=mmpretrain --config=finetune_folder \\
        --config.data.source=folder:PHOTOS
  See a recipe's learning rate, here without its data:
    python -m mbv2_jax.analysis schedule --config=mobilenet_v2_8xb32_in1k --examples=1281167

`python -m mbv2_jax.analysis COMMAND --help` lists the flags of a command; `python -m mbv2_jax.data`
examines data.
"""

from mbv2_jax.analysis import command
from mbv2_jax.analysis.command import Command, Given
from mbv2_jax.installed import require

_CHECKPOINT = command.text(
    "checkpoint",
    None,
    "PATH of the model: a model directory, a training run's workdir, one of its checkpoints "
    "(WORKDIR:best), or anything that `python -m convert` reads, such as a .pth file or the name "
    "mmpretrain.",
)


def _report(given: Given) -> None:
    require("drawing", "matplotlib")
    from mbv2_jax.analysis import report

    report.report(given.config, given.overrides, **given.flags)


def _cam(given: Given) -> None:
    require("drawing", "matplotlib")
    from mbv2_jax.analysis import cam

    flags = dict(given.flags)
    cam.cam(given.words, class_name=flags.pop("class"), **flags)


def _embedding(given: Given) -> None:
    require("drawing", "matplotlib")
    from mbv2_jax.analysis import embedding

    embedding.embedding(given.config, **given.flags)


def _schedule(given: Given) -> None:
    require("drawing", "matplotlib")
    from mbv2_jax.analysis import schedule

    schedule.schedule(given.config, **given.flags)


COMMANDS = {
    "report": Command(
        _report,
        (
            _CHECKPOINT,
            command.text("out", "report", "new folder for tables and pictures (report)."),
            command.whole("count", 24, "number of images in each grid (24)."),
        ),
    ),
    "cam": Command(
        _cam,
        (
            _CHECKPOINT,
            command.text(
                "out", "cam", "folder of the pictures (cam); no file in it is overwritten."
            ),
            command.text(
                "class",
                None,
                "the class to look for, by its name, its number, or ImageNet's id such as "
                "n01644373 (the class that the model predicts).",
            ),
            command.text(
                "layer",
                "last",
                "layer of the map: last (the default; layer7 in a network without a last "
                "convolution), stem, layer1 to layer7, or a block such as layer3_1 and "
                "layer3_1/expand. Earlier layers have finer maps of simpler things.",
            ),
            command.choice(
                "method",
                "grad",
                ["grad", "score"],
                "grad: Grad-CAM (the default); score: Score-CAM, without gradients, a pass of the "
                "network for each channel: 1,280 for last, some 10 s a photo on 2 CPU cores.",
            ),
        ),
        takes_config=False,
    ),
    "embedding": Command(
        _embedding,
        (
            _CHECKPOINT,
            command.text("out", "embedding.png", "file of the picture, replaced if it exists."),
            command.choice(
                "split", "eval", ["train", "eval"], "train or eval (the default): the split to use."
            ),
            command.whole(
                "count",
                2000,
                "number of images, drawn with the config's seed where there are more (2000).",
            ),
        ),
    ),
    "schedule": Command(
        _schedule,
        (
            command.text("out", "schedule.png", "file of the picture, replaced if it exists."),
            command.whole(
                "examples",
                None,
                "number of training images, for a machine without the data (counted).",
            ),
        ),
    ),
}


def main() -> None:
    """Parses the command line, and runs a command."""
    command.main(__doc__, COMMANDS)
