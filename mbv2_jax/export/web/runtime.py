"""ONNX Runtime Web: the three of its files that a page needs for WebAssembly on one thread."""

import hashlib
import pathlib
import shutil
import subprocess
import tempfile

from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.storage import user_cache

FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PACKAGE = "onnxruntime-web"
LOCK = pathlib.Path(__file__).with_name("package-lock.json")

_OTHERWISE = f"or give --runtime=DIR, the folder of the npm package {PACKAGE}"


def files(folder: pathlib.Path | None) -> list[pathlib.Path]:
    """Returns the paths of FILES.

    Args:
      folder: holds them, or `dist/` with them; None takes the locked version from the user's cache
        folder, into which npm downloads it once.

    Raises:
      UserError: the folder lacks some of them, or there is no npm.
      RunFailed: npm cannot download them.
    """
    if folder is None:
        return _found(_cached())
    inner = folder / "dist"
    found = _found(inner if inner.is_dir() else folder)
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise UserError(
            f"--runtime={folder} lacks {', '.join(missing)}: give the folder of the npm package "
            f"{PACKAGE}, node_modules/{PACKAGE} say"
        )
    return found


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in FILES]


def _cached() -> pathlib.Path:
    """Returns the folder with the files of the lock, which is filled if it does not exist."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    try:
        folder = user_cache.folder() / f"{PACKAGE}-{digest}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".npm_") as scratch:
                _install(pathlib.Path(scratch))
                _keep(pathlib.Path(scratch), folder)
    except OSError as error:
        raise UserError(
            f"{PACKAGE} cannot be kept in the cache ({first_line(error)}): set XDG_CACHE_HOME to a "
            f"folder that can be written, {_OTHERWISE}"
        ) from None
    return folder


def _install(scratch: pathlib.Path) -> None:
    """Installs the locked packages into `node_modules` of a folder; npm compares checksums."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"--to=web needs {PACKAGE}, which npm downloads, and there is no npm: install Node.js, "
            f"{_OTHERWISE}"
        )
    for path in (LOCK, LOCK.with_name("package.json")):
        shutil.copyfile(path, scratch / path.name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        why = "; ".join(complaints[:3]) or f"exit status {done.returncode}"
        raise RunFailed(f"npm cannot download {PACKAGE} ({why}): try again, {_OTHERWISE}")


def _keep(scratch: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves the files out of `node_modules` to their place, unless another process was faster."""
    new = scratch / "new"
    new.mkdir()
    for path in _found(scratch / "node_modules" / PACKAGE / "dist"):
        path.replace(new / path.name)
    try:
        new.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
