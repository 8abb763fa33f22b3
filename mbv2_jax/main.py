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
  Check published weights on ImageNet's validation images, against what was published:
    python -m convert mmpretrain --output=runs/mm
    python -m mbv2_jax.main --config=mobilenet_v2_8xb32_in1k --mode=eval --checkpoint=runs/mm
  Several processes: the same command on each host. TPU slices, Slurm and Open MPI are recognised;
  elsewhere say who is who (docs/launch.md):
    python -m mbv2_jax.main --config=digits --workdir=/shared/digits \\
        --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
  Parameters and multiply-adds, layer by layer:
    python -m mbv2_jax.main --config=configs/mobilenet_v2_8xb32_in1k.py --mode=info
  Does a recipe fit a TPU slice, and what does a step cost there? No TPU is needed, only libtpu:
    pip install 'mbv2_jax[tpu]'
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
    from mbv2_jax.runtime.processes import Group

HELP = {
    "workdir": "DIR of a run: checkpoints, logs, curves, model. Training goes on from the newest "
    "checkpoint.",
    "checkpoint": "PATH of a model directory or a workdir, or whatever `python -m convert` reads: "
    "what eval evaluates; where train gets its first weights, unless --workdir already holds a "
    "checkpoint.",
    "expect": "TOP1,TOP5: percentages that the evaluation should reach within 0.05; exits with 1 "
    "if not. eval's default is what was published for the weights, where the data can be "
    "ImageNet's validation images; none compares with nothing.",
    "out": "FILE for eval to write: a JSON object a line for each image, with its label, loss and "
    "five best classes. One that is there is not overwritten.",
    "coordinator_address": "HOST:PORT of process 0, which listens there for the others.",
    "num_processes": "how many processes the run has, over all hosts; 1 keeps to this one where "
    "Slurm or a TPU slice would have it join others.",
    "process_id": "which of them this one is, from 0.",
    "topology": "NAME of the TPU slice that compile compiles the training step for: its generation "
    "and its chips a side, such as v5e:2x4, v5e:16x16, v6e:4x4, v4:2x2x2.",
    "mode": "what to do; eval takes --checkpoint or --workdir, compile --topology. The last line "
    "that train, eval and compile print is JSON.",
    "tta": "eval: an image and its mirror image each have half a say, as with mmpretrain's --tta: "
    "the mean of their probabilities counts, in the loss too.",
}
# Flags of our own, not absl's global ones: --help shows these and nothing else.
FLAGS = flags.FlagValues()
PLACE = ("coordinator_address", "num_processes", "process_id")
for name in ("workdir", "checkpoint", "expect", "out", "topology", PLACE[0]):
    flags.DEFINE_string(name, None, HELP[name], flag_values=FLAGS)
for name in PLACE[1:]:
    flags.DEFINE_integer(name, None, HELP[name], flag_values=FLAGS)
MODES = ["train", "eval", "info", "compile"]
flags.DEFINE_enum("mode", "train", MODES, HELP["mode"], flag_values=FLAGS)
flags.DEFINE_boolean("tta", False, HELP["tta"], flag_values=FLAGS)
USAGE = __doc__ + (
    "\nConfig:\n  --config=FILE.py[:ARG] or --config=NAME[:ARG] of an installed recipe\n"
    "  --config.KEY=VALUE changes one field, e.g. --config.schedule.base_lr=0.1"
)


def main() -> None:
    """Parses the command line and makes one call."""
    config = command_line.parse(FLAGS, sys.argv, USAGE)
    command_line.expectation("--expect", FLAGS.expect)  # refused before anything takes time
    if FLAGS.mode != "eval" and (FLAGS.tta or FLAGS.out):
        raise UserError("--tta and --out go with --mode=eval")
    if FLAGS.mode != "compile" and FLAGS.topology:
        raise UserError("--topology goes with --mode=compile")
    place = [FLAGS[name].value for name in PLACE]
    if FLAGS.mode not in ("train", "eval") and any(value is not None for value in place):
        raise UserError(f"--{', --'.join(PLACE)} go with --mode=train and --mode=eval")

    if FLAGS.mode == "train" and __name__ == "__main__":  # not inside of somebody's program
        cpu.use_huge_pages()
    # Here: jax takes seconds, and --help needs none.
    from mbv2_jax.runtime import processes
    from mbv2_jax.training import compile as compile_lib
    from mbv2_jax.training import loop

    if FLAGS.mode == "info":
        print(loop.info(config))
    elif FLAGS.mode == "compile":
        print(json.dumps(compile_lib.compile_for(config, FLAGS.topology)[0]))
    else:
        training = FLAGS.mode == "train"
        address = processes.Address(*place)
        with processes.join(address, config.distributed, heeds_sigterm=training) as group:
            run(config, group)


def run(config: ConfigDict, group: "Group") -> None:
    """Trains or evaluates, in every process of the run."""
    from mbv2_jax.runtime import compilation_cache, processes
    from mbv2_jax.training import evaluation, loop

    overrides = command_line.overrides(FLAGS)
    expected = command_line.expectation("--expect", FLAGS.expect)
    if FLAGS.mode == "train" and group.count == 1:
        cpu.use_cores(config.batch_size, config.model.bn_group_size)
    compilation_cache.enable(config.compilation_cache, group)
    asked = {f"--{name}": FLAGS[name].value for name in HELP if name != "process_id"}
    asked |= command_line.flatten(config.to_dict())
    remedy = "Start the same one on every host"
    group.check_same("command", asked, remedy)
    remedy = "Install and set the same on every host"
    group.check_same("software", processes.software(), remedy)
    if FLAGS.mode == "train":
        result = loop.train(config, FLAGS.workdir, FLAGS.checkpoint, group)
        if result is not None:
            evaluation.report(result, expected)
    else:
        checkpoint, flip = FLAGS.checkpoint or FLAGS.workdir, FLAGS.tta
        result, card = evaluation.evaluate(
            config, checkpoint, overrides, flip=flip, out=FLAGS.out, group=group
        )
        evaluation.report(result, expected if FLAGS.expect else card)


if __name__ == "__main__":
    command_line.run(main)
