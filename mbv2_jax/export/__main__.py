"""python -m mbv2_jax.export: write a model as a file that runs without this package, and check it.

Examples:
  For ONNX Runtime, checked with your own photos:
    python -m mbv2_jax.export runs/mine --to=onnx --output=mine.onnx --check=photos/
  For phones, in 16-bit floats:
    python -m mbv2_jax.export mmpretrain --to=litert --output=mine.tflite --precision=float16
  For phones, in 8-bit integers, with ranges from a hundred photos:
    python -m mbv2_jax.export runs/mine --to=litert --output=mine.tflite --precision=int8 \\
        --calibrate=photos/
  The same of a model that was trained with --config=finetune_int8, which has its ranges:
    python -m mbv2_jax.export runs/mine_int8 --to=litert --output=mine.tflite --precision=int8 \\
        --check=photos/
  For iPhones and Macs, in 16-bit floats:
    python -m mbv2_jax.export runs/mine --to=coreml --output=mine.mlpackage --precision=float16
  For jax on any platform, for batches of any size:
    python -m mbv2_jax.export runs/mine --to=stablehlo --output=mine.stablehlo
  For browsers, a folder with a page that any static server serves:
    python -m mbv2_jax.export runs/mine --to=web --output=page
    python -m http.server --directory page

After writing, the file is opened in its own runtime and run on the photos of --check. The largest
difference from JAX, the agreement of predictions, the operators, the size and the time are printed.
A file that does not agree is deleted, and the exit status is 1. Core ML's are compared on macOS
alone.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from mbv2_jax import command_line
from mbv2_jax.errors import RunFailed, UserError, first_line

if TYPE_CHECKING:
    from mbv2_jax.export.formats import Format
    from mbv2_jax.export.program import Program

DYNAMIC = "dynamic"


def main() -> None:
    """Writes and checks a file."""
    from mbv2_jax.export import formats

    arguments = _arguments()
    format_ = formats.find(arguments.to)
    _check(arguments, format_)
    output = pathlib.Path(arguments.output).absolute()
    if output.exists() and not arguments.force:
        raise UserError(f"{output} exists: name another file, or give --force to replace it")
    if output.is_file() and format_.mark:
        raise UserError(
            f"{output} is a file, and --to={arguments.to} writes a folder: name another --output"
        )
    if output.is_dir() and not (format_.mark and (output / format_.mark).is_file()):
        raise UserError(
            f"{output} is a folder that --to={arguments.to} did not write, and is not replaced: "
            "name another --output"
        )
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: create it, or name another --output")
    format_.load(f"--to={arguments.to}")  # before the weights are read, which takes seconds

    program = _program(arguments, format_)
    from mbv2_jax.export import report

    found = _write(program, arguments, format_, output)
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else report.text(found))


def _arguments() -> argparse.Namespace:
    from mbv2_jax.export.formats import FLOAT16, FLOAT32, FORMATS, INPUTS, INT8

    names = "\n".join(f"  {name:12} {format_.what}" for name, format_ in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m mbv2_jax.export",
        description=__doc__,
        epilog=f"formats:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="anything that --checkpoint takes")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="see the end of this help")
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the file to write; a folder for coreml, savedmodel and web",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--precision",
        default=FLOAT32,
        choices=(FLOAT32, FLOAT16, INT8),
        help="of weights; for int8, and for coreml's float16, of the computation too (default: "
        "float32)",
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        help="images that the file takes at once, or 'dynamic' for any number (default: 1 for "
        "litert, coreml and web, dynamic for the others)",
    )
    parser.add_argument(
        "--size",
        metavar="H,W",
        help="height and width of the images in pixels (default: those that the model was trained "
        "for)",
    )
    parser.add_argument(
        "--input",
        default="uint8",
        choices=INPUTS,
        help="'uint8' and 'float32' are pixels from 0 to 255, which the file normalises; "
        "'normalised' is float32 that the caller normalises (default: uint8)",
    )
    _add_photos(parser)
    _add_flags_of_formats(parser)
    parser.add_argument("--json", action="store_true", help="print the report as a line of JSON")
    return parser.parse_args()


def _add_photos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="PHOTOS",
        help="int8: photos, or folders of them, whose activations give the ranges of 8-bit "
        "numbers; about a hundred of the kind that the file will see. config:NAME stands for a "
        "hundred of the training photos of a config",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="PHOTOS",
        help="photos, or folders of them, on which the file is compared with JAX (default: those "
        "of --calibrate, or four generated pictures, which do not suffice for int8)",
    )


def _add_flags_of_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        default="nhwc",
        choices=("nhwc", "nchw"),
        help="onnx: the order of the images' axes (default: nhwc)",
    )
    parser.add_argument(
        "--nms",
        action="store_true",
        help="onnx, detection: the file drops overlapping boxes, with NonMaxSuppression",
    )
    parser.add_argument(
        "--keep-float",
        default="",
        metavar="LAYERS",
        help="int8: layers that stay in floats, as the names of the model's parameters begin, "
        "separated by commas: classifier,layer7_0",
    )
    parser.add_argument(
        "--integer-io",
        action="store_true",
        help="int8: inputs and outputs are 8-bit numbers too, with the scales in the file",
    )
    parser.add_argument(
        "--runtime",
        metavar="DIR",
        help="web: the files of the npm package onnxruntime-web (its folder, or dist/ in it); "
        "without this flag npm downloads them once",
    )


def _check(arguments: argparse.Namespace, format_: "Format") -> None:
    """Refuses flags that the format does not have."""
    if arguments.precision not in format_.precisions:
        raise UserError(
            f"--to={arguments.to} has no --precision={arguments.precision}: give "
            f"{' or '.join(format_.precisions)}"
        )
    given = {
        "--calibrate": ("calibration", bool(arguments.calibrate)),
        "--layout": ("nchw", arguments.layout == "nchw"),
        "--nms": ("suppress", arguments.nms),
        "--keep-float": ("keep_float", bool(arguments.keep_float)),
        "--integer-io": ("integer_io", arguments.integer_io),
        "--runtime": ("runtime", arguments.runtime is not None),
    }
    for flag, (option, used) in given.items():
        if used and option not in format_.options:
            raise UserError(f"{flag} has no meaning for --to={arguments.to}")
        of_8_bits = option in ("calibration", "keep_float", "integer_io")
        if used and of_8_bits and arguments.precision != "int8":
            raise UserError(f"{flag} is for --precision=int8")


def _program(arguments: argparse.Namespace, format_: "Format") -> "Program":
    """Opens the model."""
    size = _size(arguments.size)
    batch = format_.batch if arguments.batch is None else _batch(arguments.batch)
    from mbv2_jax import inference  # here, because jax takes seconds
    from mbv2_jax.export import program

    saved = inference.open_model(arguments.model, seed=0)
    if size:
        saved = program.resized(saved, size)
    made = program.Program(saved, batch, arguments.input)
    _check_photos(arguments, made)
    if arguments.nms and not made.task.finds_objects:
        raise UserError(f"--nms is for objects, and {arguments.model} finds none")
    return made


def _check_photos(arguments: argparse.Namespace, program: "Program") -> None:
    """Refuses an 8-bit file that no photo calibrates or checks."""
    if arguments.precision != "int8" or arguments.calibrate:
        return
    if not program.trained_in_8_bits:
        raise UserError(
            "--precision=int8 needs --calibrate=PHOTOS: about a hundred photos of the kind that "
            "the file will see; only a model that was trained with model.quantize='int8' does "
            "without"
        )
    if not arguments.check:
        raise UserError(
            "--precision=int8 needs --check=PHOTOS: photos of the kind that the file will see, on "
            "which it is compared with JAX"
        )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    words = text.split(",")
    if len(words) != 2 or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(f"--size={text}: give height and width in pixels, such as 192,256")
    return int(words[0]), int(words[1])


def _batch(text: str) -> int | None:
    if text == DYNAMIC:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch={text}: give a number of images, or {DYNAMIC}")
    return int(text)


def _write(
    program: "Program", arguments: argparse.Namespace, format_: "Format", output: pathlib.Path
) -> Any:
    """Writes the file beside its place, checks it, and moves it there if it agrees."""
    from mbv2_jax.export import photos, report
    from mbv2_jax.export.formats import Options

    calibration = None
    if arguments.calibrate:
        calibration = photos.load(program, arguments.calibrate, "--calibrate")
    images = calibration
    if arguments.check:
        images = photos.load(program, arguments.check, "--check")
    elif images is None:
        images = photos.synthetic(program)
    options = Options(
        precision=arguments.precision,
        calibration=calibration,
        keep_float=tuple(name for name in arguments.keep_float.split(",") if name),
        integer_io=arguments.integer_io,
        nchw=arguments.layout == "nchw",
        suppress=arguments.nms,
        runtime=None if arguments.runtime is None else pathlib.Path(arguments.runtime),
    )
    writer = format_.load(f"--to={arguments.to}")
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export_") as folder:
            new = pathlib.Path(folder) / output.name
            writer.write(program, new, options)
            found = report.make(program, new, arguments.to, format_, options.precision, images)
            found = dataclasses.replace(found, file=str(output))
            found.check()
            if output.is_dir():  # which no rename replaces
                output.rename(pathlib.Path(folder) / f"old_{output.name}")
            new.replace(output)
    except OSError as error:
        raise RunFailed(f"{output} cannot be written: {first_line(error)}") from None
    return found


if __name__ == "__main__":
    command_line.run(main)
