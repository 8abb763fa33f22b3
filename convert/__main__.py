"""python -m convert: other frameworks' MobileNetV2 weights in, and out again.

In:   SOURCE is a file (.pth, .pt, .safetensors, .keras, .h5), an https address, or the name of
      published weights, listed below. DIR becomes a model directory, which holds all that
      prediction, evaluation and training need.
Out:  SOURCE is a model directory or a training workdir. FILE becomes what --to's users load.

Examples:
  Convert the weights of mmpretrain's page, and see whether they know a photo:
    python -m convert mmpretrain --output=runs/mmpretrain --check=photo.jpg
  Convert your own checkpoint; what cannot be told from it is assumed, and said:
    python -m convert work_dirs/epoch_300.pth --output=runs/mine
  A Keras model trained at 160 pixels:
    python -m convert mine.keras --output=runs/keras --set data.image_size=160
  Give a model trained here to PyTorch:
    python -m convert runs/mine --to=torchvision --output=mine.pth
"""

import argparse
import ast
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mbv2_jax import command_line
from mbv2_jax.errors import UserError


def main() -> None:
    """Parses the command line, then converts one way or the other."""
    arguments = _parser().parse_args()
    output = pathlib.Path(arguments.output)
    # Everything that can be refused is, before jax is imported (seconds) or anything downloaded.
    if arguments.to:
        _refuse_import_flags(arguments)
        _check_free(output, arguments.force, may_replace=_is_weights(output))
        _export(arguments.source, arguments.to, output)
    else:
        _check_free(output, arguments.force, may_replace=_is_model(output))
        _import(arguments, output)


def _parser() -> argparse.ArgumentParser:
    from . import published
    from .layouts import LAYOUTS, TARGETS

    names = "".join(
        f"\n  {name:18} {weights.top1:6.2f} top-1, {weights.top5:6.2f} top-5   {weights.source}"
        for name, weights in published.PUBLISHED.items()
    )
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        epilog=f"published weights:{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="see above")
    parser.add_argument("--output", required=True, metavar="DIR|FILE", help="where to write")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    parser.add_argument("--to", choices=TARGETS, help="write a file for this framework")
    reading = parser.add_argument_group("reading another framework's weights")
    reading.add_argument(
        "--layout",
        default="auto",
        choices=("auto", *LAYOUTS),
        help="whose names the file has (default: found out)",
    )
    reading.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a file with averaged and raw weights take the averaged, or (--no-ema) the raw "
        "ones; by default those that its own framework would use",
    )
    reading.add_argument(
        "--drop-background",
        action="store_true",
        help="leave out class 0 of a head with 1001 classes",
    )
    reading.add_argument(
        "--class-names", metavar="FILE", help="a name a line, in the order of the classes"
    )
    reading.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="what the weights were trained with, where it is not the custom of their layout, by "
        "the config's names: model.padding='same', model.bn_epsilon=0.001, data.image_size=192, "
        "data.eval_transforms='resize_edge(219)|center_crop(size)', data.mean, data.std, ...",
    )
    reading.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or a folder of them, of which to print the five best classes",
    )
    return parser


def _refuse_import_flags(arguments: argparse.Namespace) -> None:
    """Refuses what would have no effect when a file is written."""
    given = {
        "--layout": arguments.layout != "auto",
        "--ema": arguments.ema is not None,
        "--drop-background": arguments.drop_background,
        "--class-names": arguments.class_names,
        "--set": arguments.set,
        "--check": arguments.check,
    }
    unread = [flag for flag, is_given in given.items() if is_given]
    if unread:
        raise UserError(
            f"{', '.join(unread)} is for reading weights: convert to a model directory first, then "
            "give that with --to"
        )


def _is_model(output: pathlib.Path) -> bool:
    """Whether a folder is what this command writes, and nothing beside it would be lost."""
    return os.path.isdir(output) and {"arrays", "model.json"} == set(os.listdir(output))


def _is_weights(output: pathlib.Path) -> bool:
    """Whether a file is one of weights, by its content."""
    from . import containers

    try:
        return bool(containers.identify(output))
    except UserError:
        return False


def _check_free(output: pathlib.Path, force: bool, *, may_replace: bool) -> None:
    """Refuses an output that is there already, unless it may be replaced and --force is given."""
    empty = os.path.isdir(output) and not os.listdir(output)
    if empty or not os.path.lexists(output):
        return
    if not may_replace:
        raise UserError(
            f"--output={output} is there, and not (only) what this command writes: give another"
        )
    if not force:
        raise UserError(f"--output={output} is there already: give another, or --force")


def _import(arguments: argparse.Namespace, output: pathlib.Path) -> None:
    fields = _fields(arguments.set)
    names = _class_names(arguments.class_names)
    if os.path.isdir(arguments.source):
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
        fields=fields,
        class_names=names,
    )
    saved = imported.saved
    if saved.features_only and arguments.check:
        raise UserError(f"{arguments.source} has no classifier: leave out --check")
    _print(imported.summary)
    for line in imported.warnings:
        print(f"warning: {line}", file=sys.stderr)
    try:
        model_dir.write(output, saved.params, saved.batch_stats, saved.info)
    except (OSError, ValueError) as error:  # Orbax raises ValueError for a full disk
        what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{output} cannot be written: {what}") from None
    print(f"written: {output}")
    if arguments.check:
        from mbv2_jax import inference, predict

        predict.report(inference.Classifier(saved), arguments.check)


def _export(source: str, to: str, output: pathlib.Path) -> None:
    from . import writer

    writer.check_output(to, output)
    from mbv2_jax import model_dir

    _print(writer.write(model_dir.read(source), to, output))


def _fields(settings: Sequence[str]) -> dict[str, Any]:
    """Reads FIELD=VALUE; a value that is no Python literal is a string."""
    fields = {}
    for setting in settings:
        name, found, text = setting.partition("=")
        if not found:
            raise UserError(f"--set {setting}: write it FIELD=VALUE")
        try:
            fields[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            fields[name] = text
    return fields


def _class_names(file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        names = tuple(pathlib.Path(file).read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names={file} cannot be read: {error}") from None
    if not names or not all(name.strip() for name in names):
        raise UserError(f"--class-names={file}: write one name a line, and no empty lines")
    return names


def _print(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}   {value}")


if __name__ == "__main__":
    command_line.run(main)
