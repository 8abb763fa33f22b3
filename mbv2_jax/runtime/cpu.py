"""Settings for training on CPUs, made before JAX initialises: huge pages and a device per core.

Neither changes the results. docs/performance.md has measurements of both.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

# glibc's malloc reads it once, when a program starts, and asks for huge pages for large blocks.
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Images per device, at least: with fewer, a device would mostly wait for the others.
_MIN_IMAGES = 8


def use_huge_pages() -> None:
    """Restarts this program with huge pages, where Linux offers them on request.

    A step allocates its memory anew each time, and the system must clear it page by page: pages of
    2 MiB instead of 4 KiB. Call it at the start of a program, before it has threads. Does nothing
    where GLIBC_TUNABLES is set, where JAX uses another platform than CPUs, and on other systems.
    """
    if not _only_cpus() or TUNABLES in os.environ or "[madvise]" not in _mode():
        return
    print(f"starting again with {TUNABLES}={HUGE_PAGES}", file=sys.stderr, flush=True)
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {TUNABLES: HUGE_PAGES})


def use_cores(batch_size: int, group_size: int | str) -> None:
    """Configures JAX to make a CPU device for each core, as far as a batch can be split over them.

    Each core then works on images of its own. With a single device XLA splits every operation over
    all cores, and cores without a common cache exchange every intermediate result. Does nothing
    where the number of devices is set already; devices of other platforms stay as they are.

    Args:
      batch_size: images per step.
      group_size: images that BatchNorm normalises together; 0: all. With "device", the number of
        devices changes the result, and is left as it is.
    """
    import jax

    requested = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if requested != -1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # Only Linux was measured; on a Mac some cores are slower than others.
    if isinstance(group_size, str) or sys.platform != "linux":
        return
    most = min(len(os.sched_getaffinity(0)), batch_size // _MIN_IMAGES)
    groups = batch_size // (group_size or batch_size or 1) or 1
    counts = range(max(most, 1), 0, -1)
    fits = (n for n in counts if batch_size % n == 0 and (groups % n == 0 or n % groups == 0))
    jax.config.update("jax_num_cpu_devices", next(fits))


def _only_cpus() -> bool:
    """Returns whether JAX will run on CPUs, as far as one can tell without initialising it."""
    wanted = os.environ.get("JAX_PLATFORMS")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return wanted == "cpu" or not (wanted or plugins or importlib.util.find_spec("libtpu"))


def _mode() -> str:
    """Returns the kernel's setting for huge pages; "" where there is none."""
    try:
        return _MODE.read_text()
    except OSError:
        return ""
