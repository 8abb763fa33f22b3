"""python -m mbv2_jax.main: train and evaluate MobileNetV2, or print its costs.

Examples:
  Train the demo (handwritten digits, a CPU is enough); the same command again continues it:
    python -m mbv2_jax.main --config=configs/digits.py --workdir=runs/digits
  Evaluate the trained model; the last line printed is JSON:
    python -m mbv2_jax.main --config=configs/digits.py --mode=eval --checkpoint=runs/digits
  Change any field of the config (listed below):
    python -m mbv2_jax.main --config=digits --workdir=runs/narrow --config.model.width=0.25
  Fine-tune on folders of your own photos, PHOTOS/CLASS/*.jpg, of which a fifth is held out (or
  PHOTOS/train/CLASS/*.jpg and PHOTOS/val/CLASS/*.jpg):
    python -m mbv2_jax.main --config=configs/finetune_folder.py --workdir=runs/mine \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/digits
  Learn to segment your own pictures (docs/segmentation.md), from any trained MobileNetV2:
    python -m mbv2_jax.main --config=finetune_segmentation --workdir=runs/masks \\
        --config.data.source=pairs:PICTURES --checkpoint=runs/mm
  Learn to find objects, from pictures with boxes in the layout of YOLO, COCO or VOC
  (docs/detection.md):
    python -m mbv2_jax.main --config=finetune_detection --workdir=runs/boxes \\
        --config.data.source=yolo:PICTURES --checkpoint=runs/mm
  End it after 5 evaluations without a better one; its best and its last checkpoint have names:
    python -m mbv2_jax.main --config=configs/finetune_folder.py --workdir=runs/mine \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/digits --config.checkpoint.patience=5
    python -m mbv2_jax.main --config=configs/finetune_folder.py --mode=eval \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/mine:last
  Check published weights on ImageNet's validation images against their published figures:
    python -m convert mmpretrain --output=runs/mm
    python -m mbv2_jax.main --config=mobilenet_v2_8xb32_in1k --mode=eval --checkpoint=runs/mm
  Several processes: the same command on each host. TPU slices, Slurm and Open MPI are recognised;
  elsewhere number the hosts (docs/multi-host.md):
    python -m mbv2_jax.main --config=digits --workdir=/shared/digits \\
        --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
  Parameters and multiply-adds, layer by layer:
    python -m mbv2_jax.main --config=configs/mobilenet_v2_8xb32_in1k.py --mode=info
  Find out whether a recipe fits a TPU slice, and the cost of a step; this needs libtpu, no TPU:
    pip install -e '.[tpu]'
    python -m mbv2_jax.main --config=mobilenet_v2_tpu_4096 --mode=compile --topology=v5e:16x16
"""

import json
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from mbv2_jax import command_line
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import cpu

if TYPE_CHECKING:
    from mbv2_jax.runtime import processes

HELP = {
    "workdir": "DIR of a run: checkpoints, logs, curves, model. Training continues from the newest "
    "checkpoint in it.",
    "checkpoint": "PATH of a model directory or a workdir (WORKDIR:best, WORKDIR:last and "
    "WORKDIR:STEP are its checkpoints), or anything that `python -m convert` reads: the model to "
    "evaluate; in training, the weights to start from, unless --workdir "
    "already holds a checkpoint.",
    "expect": "TOP1,TOP5 (segmentation: MIOU,PIXEL_ACCURACY; detection: MAP,MAP50,MAP75), or some "
    "by name, such as mIoU=75.32: percentages that the evaluation should reach within 0.05; exits "
    "with 1 if it does not. By default, eval compares with the figures published for the weights "
    "if the data may be the images that they are for; none compares with nothing.",
    "out": "FILE for eval to write: one line of JSON for each image, with its label, loss and five "
    "best classes (segmentation: the number of pixels that count, their accuracy and their loss). "
    "Detection: all boxes in COCO's JSON of results. An existing file is not overwritten.",
    "coordinator_address": "HOST:PORT of process 0, which listens there for the others.",
    "num_processes": "number of processes of the run, over all hosts; 1 runs this process alone "
    "even where Slurm or a TPU slice would have it join others.",
    "process_id": "number of this process, from 0.",
    "topology": "NAME of the TPU slice for which to compile the training step: its generation and "
    "its chips per side, such as v5e:2x4, v5e:16x16, v6e:4x4, v4:2x2x2.",
    "mode": "train, eval, info or compile; eval takes --checkpoint or --workdir, compile "
    "--topology. The last line that train, eval and compile print is JSON.",
    "tta": "eval: averages the probabilities of each image and of its mirror image, as "
    "mmpretrain's --tta does (segmentation: of both at six scales from 0.5 to 1.75; detection: "
    "the best boxes of both).",
}
# Flags of our own, not absl's global ones: --help shows these and nothing else.
FLAGS = flags.FlagValues()
ADDRESS = ("coordinator_address", "num_processes", "process_id")
for name in ("workdir", "checkpoint", "expect", "out", "topology", ADDRESS[0]):
    flags.DEFINE_string(name, None, HELP[name], flag_values=FLAGS)
for name in ADDRESS[1:]:
    flags.DEFINE_integer(name, None, HELP[name], flag_values=FLAGS)
MODES = ["train", "eval", "info", "compile"]
flags.DEFINE_enum("mode", "train", MODES, HELP["mode"], flag_values=FLAGS)
flags.DEFINE_boolean("tta", False, HELP["tta"], flag_values=FLAGS)


def main() -> None:
    """Parses the command line and makes one call."""
    config = command_line.parse(FLAGS, sys.argv, __doc__)
    _check_flags()
    if FLAGS.mode == "train" and __name__ == "__main__":  # not inside another program
        cpu.use_huge_pages()
    # Imported here, since jax takes seconds to import and --help does not need it.
    from mbv2_jax.runtime import processes
    from mbv2_jax.training import compile as compile_lib
    from mbv2_jax.training import info

    if FLAGS.mode == "info":
        print(info.describe(config))
    elif FLAGS.mode == "compile":
        print(json.dumps(compile_lib.compile_for(config, FLAGS.topology)[0]))
    else:
        address = processes.Address(*(FLAGS[name].value for name in ADDRESS))
        training = FLAGS.mode == "train"
        with processes.join(address, config.distributed, handles_sigterm=training) as group:
            run(config, group)


def _check_flags() -> None:
    """Refuses impossible combinations of flags before anything takes time."""
    if FLAGS.mode != "eval" and (FLAGS.tta or FLAGS.out):
        raise UserError("--tta and --out go with --mode=eval")
    if FLAGS.mode != "compile" and FLAGS.topology:
        raise UserError("--topology goes with --mode=compile")
    given = any(FLAGS[name].value is not None for name in ADDRESS)
    if FLAGS.mode not in ("train", "eval") and given:
        raise UserError(f"--{', --'.join(ADDRESS)} go with --mode=train and --mode=eval")


def run(config: ConfigDict, group: "processes.Group") -> None:
    """Trains or evaluates, in every process of the run."""
    from mbv2_jax import tasks
    from mbv2_jax.runtime import compilation_cache, processes
    from mbv2_jax.training import evaluation, loop

    expected = command_line.expectation("--expect", FLAGS.expect, tasks.find(config.task).figures)
    if FLAGS.mode == "train" and group.count == 1:
        cpu.use_cores(config.batch_size, config.model.bn_group_size)
    compilation_cache.enable(config.compilation_cache, group)
    command = {f"--{name}": FLAGS[name].value for name in HELP if name != "process_id"}
    command |= command_line.flatten(config.to_dict())
    group.check_same("command", command, "Start the same one on every host")
    group.check_same("software", processes.software(), "Install and set the same on every host")
    if FLAGS.mode == "train":
        result = loop.train(config, FLAGS.workdir, FLAGS.checkpoint, group)
        if result is not None:
            evaluation.report(result, expected)
        return
    result, published = evaluation.evaluate(
        config,
        FLAGS.checkpoint or FLAGS.workdir,
        command_line.overrides(FLAGS),
        group,
        tta=FLAGS.tta,
        out=FLAGS.out,
    )
    evaluation.report(result, expected if FLAGS.expect else published)


if __name__ == "__main__":
    command_line.run(main)
