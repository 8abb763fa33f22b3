"""What a run on CPUs sets up before JAX looks at its devices: large pages, a device for each core.

Neither changes what is computed. What both are worth: docs/performance.md.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

# For the large blocks that glibc's malloc gives out. It reads this once, when a program starts.
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# On one device: with fewer images to work on it would mostly wait for the others.
_LEAST_IMAGES = 8


def use_huge_pages() -> None:
    """Starts this program again with huge pages, where the system gives them to who asks.

    A step's memory is new each time, and must be cleared by the system, page by page: 4 KiB or, so,
    2 MiB. Does nothing where something is set in GLIBC_TUNABLES, or JAX has another platform than
    CPUs; other systems than Linux don't have it. It is for the start of a program, before threads.
    """
    if not _only_cpus() or TUNABLES in os.environ or "[madvise]" not in _mode():
        return
    print(f"starting again with {TUNABLES}={HUGE_PAGES}", file=sys.stderr, flush=True)
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {TUNABLES: HUGE_PAGES})


def use_cores(batch_size: int, group_size: int | str) -> None:
    """Has JAX make a CPU device for each core, as far as a batch can be split over them.

    A core then works on images of its own. Of one device XLA splits every operation over all cores,
    and cores that share no cache send each other all that they make. Does nothing where the number
    of devices is set already; of other platforms' devices it changes nothing.

    Args:
      batch_size: images of a step.
      group_size: of them that are normalised together; 0: all. "device", a device's share: then
        the number of devices has a meaning, and stays.
    """
    import jax

    asked = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if asked != -1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # Elsewhere it was not measured; on a Mac some cores are slower than others.
    if isinstance(group_size, str) or sys.platform != "linux":
        return
    most = min(len(os.sched_getaffinity(0)), batch_size // _LEAST_IMAGES)
    groups = batch_size // (group_size or batch_size or 1) or 1
    counts = range(max(most, 1), 0, -1)
    fits = (n for n in counts if batch_size % n == 0 and (groups % n == 0 or n % groups == 0))
    jax.config.update("jax_num_cpu_devices", next(fits))


def _only_cpus() -> bool:
    """Whether JAX will run on CPUs, as far as one can tell without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return wanted == "cpu" or not (wanted or plugins or importlib.util.find_spec("libtpu"))


def _mode() -> str:
    try:
        return _MODE.read_text()
    except OSError:  # another system, or one without
        return ""
