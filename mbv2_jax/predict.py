"""python -m mbv2_jax.predict: name what is in image files.

Examples:
  python -m mbv2_jax.predict seven.png four.jpg --checkpoint=runs/digits
  python -m mbv2_jax.predict photos/*.jpg --checkpoint=runs/mine/model --topk=3 --json
"""

import argparse
import json
import sys
from typing import Any

from mbv2_jax import command_line
from mbv2_jax.errors import UserError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mbv2_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a model directory or a workdir"
    )
    parser.add_argument(
        "--topk", type=int, default=5, metavar="K", help="how many classes to name (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    arguments = parser.parse_args()
    if arguments.topk < 1:
        parser.error(f"--topk={arguments.topk}: give 1 or more")
    return arguments


def main() -> None:
    """Predicts the images one by one; a bad file does not stop the others."""
    arguments = _arguments()

    from mbv2_jax import inference  # here, because jax takes seconds and --help needs none

    classifier = inference.init_model(arguments.checkpoint)
    bad = 0
    for path in arguments.images:
        try:
            result = inference.inference_model(classifier, path)
        except UserError as error:
            bad += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        print(_line(path, result, classifier.class_names, arguments.topk, arguments.json))
    if bad:
        raise UserError(f"{bad} of {len(arguments.images)} images could not be predicted")


def _line(
    path: str, result: dict[str, Any], class_names: tuple[str, ...], topk: int, as_json: bool
) -> str:
    scores = result["pred_scores"]
    best = [int(label) for label in (-scores).argsort(kind="stable")[:topk]]
    if as_json:
        ranked = [
            {"label": label, "class": class_names[label], "score": float(scores[label])}
            for label in best
        ]
        return json.dumps({"image": path, "predictions": ranked})
    named = "   ".join(f"{class_names[label]} {scores[label]:7.2%}" for label in best)
    return f"{path}   {named}"


if __name__ == "__main__":
    command_line.run(main)
