"""python -m convert: converts MobileNetV2 weights from other frameworks and to them.

From:  SOURCE is a file of PyTorch (.pth, .pt, .bin, .ckpt), safetensors, Keras (.keras, .h5),
       TensorFlow.js (model.json, .zip) or TensorFlow (.pb, .tgz, .tflite); an https address; a
       repository of the Hugging Face Hub (hf:OWNER/NAME[@REVISION]) or a folder as there; or the
       name of published weights, listed below. DIR becomes a model directory, which holds all that
       prediction, evaluation and training need.
To:    SOURCE is a model directory, a training workdir, or one of its checkpoints (WORKDIR:best,
       WORKDIR:last or WORKDIR:STEP). FILE becomes a file for the framework that --to names.

Examples:
  Convert the weights of mmpretrain's page, and check them with a photo:
    python -m convert mmpretrain --output=runs/mmpretrain --check=photo.jpg
  Convert your own checkpoint; every assumption about it is printed:
    python -m convert work_dirs/epoch_300.pth --output=runs/mine
  A Keras model trained at 160 pixels:
    python -m convert mine.keras --output=runs/keras --set data.image_size=160
  The backbone of a detector or a segmenter, without its head:
    python -m convert frozen_inference_graph.pb --features-only --output=runs/backbone
  Give a model trained here to PyTorch, or to timm as a folder that opens by itself:
    python -m convert runs/mine --to=torchvision --output=mine.pth
    python -m convert runs/mine --to=timm --output=mine_timm
"""

import argparse
import ast
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mbv2_jax import checkpoint_names, command_line, model_json
from mbv2_jax.errors import UserError

from . import hub_folder


def main() -> None:
    """Parses the command line, then converts one way or the other."""
    arguments = _parser().parse_args()
    output = pathlib.Path(arguments.output)
    # Bad arguments are refused before jax is imported (seconds) and anything is downloaded.
    if arguments.to:
        _refuse_import_flags(arguments)
        own = _is_weights(output) or hub_folder.is_own(output)
        _check_free(output, arguments.force, may_replace=own)
        _export(arguments.source, arguments.to, output)
    else:
        _check_free(output, arguments.force, may_replace=model_json.is_model(output))
        _import(arguments, output)


def _parser() -> argparse.ArgumentParser:
    from . import fields, published
    from .layouts import LAYOUTS, TARGETS

    names = "".join(
        f"\n  {name:18} {published.figures(weights.figures):26} {weights.source}"
        for name, weights in published.PUBLISHED.items()
    )
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        epilog=f"published weights:{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="the weights, see above")
    parser.add_argument(
        "--output", required=True, metavar="DIR|FILE", help="the directory or file to write"
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    parser.add_argument("--to", choices=TARGETS, help="write a file for this framework")
    reading = parser.add_argument_group("reading another framework's weights")
    reading.add_argument(
        "--layout",
        default="auto",
        choices=("auto", *LAYOUTS),
        help="the framework whose names the file has (default: recognised by the names)",
    )
    reading.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="select the averaged weights of a file with averaged and raw ones, or (--no-ema) the "
        "raw ones; by default those that its own framework would use",
    )
    reading.add_argument(
        "--drop-background",
        action="store_true",
        help="remove class 0 of a head with 1001 classes",
    )
    reading.add_argument(
        "--features-only",
        action="store_true",
        help="convert the backbone alone, and leave out whatever head the file has",
    )
    reading.add_argument(
        "--class-names", metavar="FILE", help="one name a line, in the order of the classes"
    )
    reading.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a value with which the weights were trained, where it differs from their layout's "
        "convention: model.padding='same', data.image_size=192, "
        "data.eval_transforms='resize_edge(219)|center_crop(size)', ...; FIELD is one of "
        + ", ".join(fields.SETTABLE),
    )
    reading.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or a folder of them, whose five best classes are printed",
    )
    return parser


def _refuse_import_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags that have no effect when a file is written."""
    given = {
        "--layout": arguments.layout != "auto",
        "--ema": arguments.ema is not None,
        "--drop-background": arguments.drop_background,
        "--features-only": arguments.features_only,
        "--class-names": arguments.class_names,
        "--set": arguments.set,
        "--check": arguments.check,
    }
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise UserError(
            f"{', '.join(unused)} is for reading weights: convert to a model directory first, then "
            "give that with --to"
        )


def _is_weights(output: pathlib.Path) -> bool:
    """Returns whether a file holds weights, judged by its content."""
    from .readers import identify

    try:
        return bool(identify.container(output))
    except UserError:
        return False


def _check_free(output: pathlib.Path, force: bool, *, may_replace: bool) -> None:
    """Refuses an output that exists, unless it may be replaced and --force is given."""
    empty = os.path.isdir(output) and not os.listdir(output)
    if empty or not os.path.lexists(output):
        return
    if not may_replace:
        raise UserError(
            f"--output={output} exists, and this command did not write all of it: give another"
        )
    if not force:
        raise UserError(f"--output={output} exists already: give another, or --force")


def _import(arguments: argparse.Namespace, output: pathlib.Path) -> None:
    """Converts a file to a model directory."""
    fields = _fields(arguments.set)
    names = _class_names(arguments.class_names)
    source = pathlib.Path(checkpoint_names.split(arguments.source)[0])
    if source.is_dir() and not hub_folder.has_weights(source):
        raise UserError(
            f"{arguments.source} is a directory: give a file of weights to read, or --to=... to "
            "write one from it"
        )
    for image in arguments.check:
        if not os.path.exists(image):
            raise UserError(f"--check: there is no {image}")

    from mbv2_jax import model_dir

    from . import importer

    imported = importer.load(
        arguments.source,
        layout=arguments.layout,
        ema=arguments.ema,
        drop_background=arguments.drop_background,
        features_only=arguments.features_only,
        fields=fields,
        class_names=names,
    )
    saved = imported.saved
    if saved.features_only and arguments.check:
        raise UserError(f"{arguments.source} has no head: leave out --check")
    _print(imported.summary)
    for line in imported.warnings:
        print(f"warning: {line}", file=sys.stderr)
    try:
        model_dir.write(output, saved.params, saved.batch_stats, saved.description)
    except (OSError, ValueError) as error:  # Orbax raises ValueError for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{output} cannot be written: {reason}") from None
    print(f"written: {output}")
    if arguments.check:
        from mbv2_jax import inference, predict

        predict.report(inference.Predictor(saved), arguments.check)


def _export(source: str, to: str, output: pathlib.Path) -> None:
    """Writes a model to a file of another framework."""
    from . import writer

    writer.check_output(to, output)
    from mbv2_jax import model_dir

    _print(writer.write(model_dir.read(source), to, output))


def _fields(settings: Sequence[str]) -> dict[str, Any]:
    """Parses FIELD=VALUE; a value that is not a Python literal is a string."""
    fields = {}
    for setting in settings:
        name, found, text = setting.partition("=")
        if not found:
            raise UserError(f"--set {setting}: write it FIELD=VALUE")
        try:
            fields[name] = ast.literal_eval(text)
        # What is no literal is text; so is what Python cannot even parse, such as 1,000 brackets.
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            fields[name] = text
    return fields


def _class_names(file: str | None) -> tuple[str, ...]:
    """Reads the file of --class-names; () without one."""
    if file is None:
        return ()
    try:
        names = tuple(pathlib.Path(file).read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names={file} cannot be read: {error}") from None
    if not names or not all(name.strip() for name in names):
        raise UserError(f"--class-names={file}: write one name a line, without empty lines")
    return names


def _print(lines: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}   {value}")


if __name__ == "__main__":
    command_line.run(main)
