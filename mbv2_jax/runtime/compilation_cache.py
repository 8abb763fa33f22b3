"""JAX's cache of compiled programs, with which later processes start within seconds.

JAX's key of a program covers the program, JAX's version and the devices, but not the processor of
the host: a program compiled for one CPU may stop with an illegal instruction on another, and
clusters share home folders. The default folder therefore has a subfolder for each kind of
processor.
"""

import hashlib
import os
import pathlib
import platform
import tempfile
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes, shared_folder
from mbv2_jax.runtime.processes import Group
from mbv2_jax.storage import bucket, user_cache

# JAX's default: seconds of compiling below which it does not keep a program. A faster machine takes
# less for a whole network.
_JAX_MIN_COMPILE_TIME = 1.0


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> None:
    """Has JAX keep the programs that it compiles from now on, so that later processes find them.

    A kept program is loaded in a tenth of a second, where compiling a network takes seconds. The
    programs of other JAX code in this process are kept, too. Nothing in this package but this
    function and the commands changes a setting of JAX; it sets

    - `jax_compilation_cache_dir`: the folder;
    - `jax_persistent_cache_min_compile_time_secs`: 0 instead of JAX's default, 1, so that small
      programs are kept as well; another value than the default stays;
    - `jax_persistent_cache_enable_xla_caches`: "none", for a bucket alone.

    The folder that the variable JAX_COMPILATION_CACHE_DIR names stays, and so does one that JAX has
    been given otherwise, unless `folder` names another. Then nothing is changed.

    Args:
      folder: a folder on a disk, or gs://BUCKET/FOLDER; it is created. None: the user's cache
        folder, ~/.cache/mbv2_jax or in $XDG_CACHE_HOME. A folder that cannot be written is
        reported, and costs nothing but time.

    Raises:
      UserError: there is no such bucket, or `folder` is an address of another kind.
    """
    if folder is not None:
        enable(os.fspath(folder))
    elif not jax.config.values["jax_compilation_cache_dir"]:
        enable()


def enable(setting: str | None = None, group: Group | None = None) -> None:
    """Has JAX keep the programs that it compiles from now on.

    The variable JAX_COMPILATION_CACHE_DIR overrides `setting`. Of several processes only the first
    writes, and all of them read. The cache is disabled, whatever is set, for several processes on
    CPUs, and for several that do not see the first one's folder. A folder that cannot be written is
    reported, and costs nothing but time.

    Args:
      setting: config.compilation_cache: a folder on a disk or in a bucket; None: the user's cache
        folder; "": no cache.
      group: the processes of the run; None: this process has no others.

    Raises:
      UserError: there is no such bucket, or `setting` is an address of another kind.
    """
    bucket.check_scheme(setting or "", "compilation_cache")
    group = group or processes.single()
    if group.count > 1 and mesh_lib.on_cpu():
        # On CPUs, unlike on GPUs, a program's key differs between processes. Only the first one
        # would find it, and wait for the others to compile, for which Gloo gives it 30 s. Besides,
        # a cached program does its sums in another order than a compiled one: the processes would
        # mix up their messages.
        _disable()
        return
    variable = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if variable and group.count == 1:
        return  # JAX itself reads it
    folder = _make_folder(variable or setting)
    if group.count > 1 and not _all_see(folder, group):
        _disable()
    elif folder is not None and not variable:
        _use(folder)


def _disable() -> None:
    jax.config.update("jax_enable_compilation_cache", False)


def _use(folder: str) -> None:
    if bucket.is_address(folder) and "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # XLA's own caches, of a GPU's tuning, can be written to disks only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if jax.config.values["jax_compilation_cache_dir"] not in (None, folder):
        jax_cache.reset_cache()  # JAX opens a folder once
    jax.config.update("jax_compilation_cache_dir", folder)
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == _JAX_MIN_COMPILE_TIME:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A full disk, or an entry that a killed run left half written: the program is compiled anew.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _make_folder(setting: str | None) -> str | None:
    """Returns the folder that a setting names, created and writable; None where there is none."""
    if setting == "":
        return None
    if setting is not None and bucket.is_address(setting):
        bucket.parse_path(setting, "compilation_cache")
        return setting
    try:
        folder = _default_folder() if setting is None else pathlib.Path(setting).expanduser()
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


def _all_see(folder: str | None, group: Group) -> bool:
    """Returns whether every process sees the first one's folder.

    Otherwise some processes would compile programs that the others find. On GPUs the processes
    share the tuning of a program, and would wait for each other's part for ever.
    """
    folders = group.exchange("compilation cache", folder or "")
    if not all(folders):
        return False
    if len(set(folders)) == 1 and bucket.is_address(folders[0]):
        return True
    own = pathlib.Path(folders[group.index])
    differ = any(map(bucket.is_address, folders))
    if differ or shared_folder.unseeing(own, "compilation cache", group):
        processes.say(
            f"compiled programs are not kept: {folders[0]} is not on a disk that all hosts share; "
            "--config.compilation_cache=FOLDER names one that is"
        )
        return False
    return True


def _default_folder() -> pathlib.Path:
    return user_cache.folder() / "compiled" / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
    """Returns a short hash of this machine's processor model and its features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    kinds = {line for line in lines if line.lower().startswith(("flags", "features", "model name"))}
    text = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
