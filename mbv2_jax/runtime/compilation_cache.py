"""Compiled programs, kept between runs: a run that goes on needs seconds to its first step.

jax does it; here it is told where. The key of an entry is of the program, of jax's version and of
the devices. What it is not of is the host's own processor: a program compiled for one CPU may stop
with an illegal instruction on another, and clusters share home folders. So the default folder has
one folder for each kind of processor.
"""

import hashlib
import os
import pathlib
import platform
import tempfile
import warnings

import jax
from ml_collections import ConfigDict

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes
from mbv2_jax.storage import bucket
from mbv2_jax.training import workdir as workdir_lib


def enable(setting: str | None = None, timeouts: ConfigDict | None = None) -> None:
    """Keeps what is compiled from here on.

    The variable JAX_COMPILATION_CACHE_DIR comes before it. Of several processes only the first
    writes, and all read; where one of them would not see what it writes, and several on CPUs, keep
    nothing, whatever is set. A folder that cannot be written is said, and costs time only.

    Args:
      setting: config.compilation_cache: a folder, on a disk or in a bucket; None: in the user's
        cache; "": nowhere.
      timeouts: the config's `distributed` section; several processes need it.

    Raises:
      UserError: there is no such bucket.
    """
    if processes.count() > 1 and mesh_lib.on_cpu():
        # There, unlike on GPUs, a program's key is another one in each process. So only the first
        # would find it, and wait for the others to compile, for which Gloo gives it 30 s. Nor are
        # the sums of a program that was read in the order of one that was compiled: the processes
        # would mix up what they send each other.
        jax.config.update("jax_enable_compilation_cache", False)
        return
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and processes.count() == 1:
        return  # JAX itself reads it
    folder = _folder(given or setting)
    if timeouts is not None and processes.count() > 1 and not _all_see(folder, timeouts):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if given or folder is None:
        return
    if bucket.is_address(folder) and "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # XLA's own, of a GPU's tuning, is written by code that knows disks only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", folder)
    # An entry that a killed run left half written, or a full disk: then it is compiled anew.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _folder(setting: str | None) -> str | None:
    """Returns the folder that a setting means, made and writable; None where there is none."""
    if setting == "":
        return None
    if setting is not None and bucket.is_address(setting):
        bucket.place(setting, "compilation_cache")
        return setting
    try:
        folder = _user_folder() if setting is None else pathlib.Path(setting).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if setting is not None:
            processes.say(
                f"compilation_cache={setting} cannot be written: {error.strerror}; everything is "
                "compiled anew"
            )
        return None
    return str(folder.absolute())


def _all_see(folder: str | None, timeouts: ConfigDict) -> bool:
    """Whether every process sees the first one's folder.

    Else those which do not would compile what the others find. On GPUs they share the tuning of a
    program, and wait for the part of each: for ever.
    """
    folders = processes.exchange("compilation cache", folder or "", timeouts)
    if not all(folders):
        return False
    if len(set(folders)) == 1 and bucket.is_address(folders[0]):
        return True
    blind = any(map(bucket.is_address, folders)) or workdir_lib.blind(
        pathlib.Path(folders[processes.index()]), "compilation cache", timeouts
    )
    if blind:
        processes.say(
            f"what is compiled is not kept: {folders[0]} is not on a disk that all hosts share; "
            "--config.compilation_cache=FOLDER names one that is"
        )
    return not blind


def _user_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the standard says to ignore
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home folder")
    return pathlib.Path(base, "mbv2_jax", "compiled", f"{platform.machine()}-{_processor()}")


def _processor() -> str:
    """Returns a short name of what this machine's processor can do."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    kinds = {line for line in lines if line.lower().startswith(("flags", "features", "model name"))}
    text = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
