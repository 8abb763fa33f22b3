"""The size of a config's network, for --mode=info."""

from ml_collections import ConfigDict

from mbv2_jax.models import profile
from mbv2_jax.training import config as config_lib


def describe(config: ConfigDict) -> str:
    """Returns the layers, parameters and multiply-adds of a config's network as text."""
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    size = spec.preprocessing.image_size
    mode = config_lib.on_devices(spec.mode, settings.run.batch_size, devices=1)
    measured = profile.profile(task.network(spec.backbone, mode), size)
    lines = [
        profile.table(measured),
        "",
        f"image size     {size} x {size}",
        f"parameters     {measured.params:,}",
        f"multiply-adds  {measured.multiply_adds:,}",
    ]
    if task.classifies:
        lines.append(
            f"page's count   {measured.page_count / 1e9:.3f} G  (mmpretrain's: BatchNorm, ReLU6 "
            "and pooling counted, the head not)"
        )
    if task.head is None:
        lines.append(f"the head is left out: {task.open_head}")
    return "\n".join(lines)
