"""Damages weight files, and counts how the converter takes them: make fuzz.

Every container gets COUNT files: hand-made hostile ones, and real ones with random damage. Each is
converted in a forked process. A file may be converted (the damage may hit a number) or refused with
a line that names it; a crash, more than 10 seconds, and more memory than 5 times the file's size
and 300 MB are failures, which are listed and kept, and the exit status is 1.
"""

import argparse
import csv
import gc
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

from tqdm import tqdm

from mbv2_jax.convert import importer
from tests.fuzz import hostile, worker
from tests.fuzz.damage import damaged
from tests.fuzz.worker import OUTCOMES, Outcome

_common: list[Any] = []  # originals, attacks, and the folder for files that failed


def main() -> int:
    arguments = _parser().parse_args()
    wanted = arguments.containers or list(hostile.CONTAINERS)
    kept = pathlib.Path(arguments.keep)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # In another process, since the frameworks that write the files start threads, and take
        # memory, whose pages would be copied for each conversion.
        subprocess.run([sys.executable, "-m", "tests.fuzz.seeds", folder, *wanted], check=True)
        for name in wanted:
            made = sorted(pathlib.Path(folder, name).iterdir())
            originals = [path for path in made if path.suffix != ".bin"]
            rows.append(_try(name, originals, arguments.count, kept))
    with open(arguments.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {arguments.output}")
    return int(any(row[name] for row in rows for name in OUTCOMES[2:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("containers", nargs="*", choices=[[], *hostile.CONTAINERS], metavar="NAME")
    parser.add_argument("--count", type=int, default=1000, help="files of each container")
    parser.add_argument("--output", default="benchmarks/fuzz.csv", help="the CSV file to write")
    parser.add_argument("--keep", default="build/fuzz", help="a folder for files that failed")
    return parser


def _try(
    name: str, originals: list[pathlib.Path], count: int, kept: pathlib.Path
) -> dict[str, Any]:
    """Converts files of one container, and returns a row of the CSV file."""
    for original in originals:
        importer.load(original)  # remembers what forked processes would find out anew each time
        outcome = worker.convert(original)
        if outcome.name != worker.CONVERTED:
            raise SystemExit(f"{name}: {original} itself was {outcome.name}: {outcome.line}")
    attacks = hostile.files(name, originals)
    gc.freeze()  # or a collection in each process would copy its memory
    # Forked processes have them already: sent with each number, they would take most of the time.
    arguments = (originals, attacks, kept / name.replace(" ", "_"))
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _begin, arguments) as pool:
        done = pool.imap_unordered(_attempt, range(count))
        outcomes = list(tqdm(done, name, count, disable=None))
    counts = Counter(outcome.name for outcome in outcomes)
    row = {
        "container": name,
        "files": count,
        "hostile": min(len(attacks), count),
        **{key: counts[key] for key in OUTCOMES},
        "slowest_s": f"{max(outcome.seconds for outcome in outcomes):.2f}",
        "most_memory_mb": max(outcome.memory for outcome in outcomes) >> 20,
    }
    print(row, file=sys.stderr)
    return row


def _begin(*arguments: Any) -> None:
    """Keeps what the attempts of this process have in common."""
    _common[:] = arguments


def _attempt(number: int) -> Outcome:
    """Converts file `number`, and keeps it where that fails."""
    originals, attacks, kept = _common
    chance = random.Random(number)
    original = originals[number % len(originals)]
    attack = attacks[number] if number < len(attacks) else None
    content = damaged(original.read_bytes(), chance) if attack is None else attack
    with tempfile.TemporaryDirectory() as folder:
        for beside in original.parent.iterdir():
            if beside.suffix in (".bin", ".json") and beside != original:
                (pathlib.Path(folder) / beside.name).symlink_to(beside)
        path = pathlib.Path(folder) / original.name
        path.write_bytes(content)
        outcome = worker.convert(path)
    if outcome.name not in (worker.CONVERTED, worker.REFUSED):
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{number}{original.suffix}").write_bytes(content)
        print(f"{kept.name} {number}: {outcome}", file=sys.stderr)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
