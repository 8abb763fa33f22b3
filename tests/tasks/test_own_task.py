"""A task of one's own, named in the config: trained, evaluated, continued and used for prediction.

It predicts an image's mean colour. Nothing in the package knows it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from mbv2_jax import spec
from mbv2_jax.data.sample import ArraySpec, Frame, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.models.mobilenet_v2 import Backbone
from mbv2_jax.tasks.task import Batch, Summary, Task
from tests.support import commands

CLOSE = 32.0  # grey levels within which a prediction counts


@dataclasses.dataclass(frozen=True)
class Head:
    channels: int = spec.declare(3, spec.integer(1), "colours to predict")


class MeanColourNetwork(nn.Module):
    """The backbone with one dense layer on its pooled features."""

    architecture: spec.Backbone
    mode: spec.TrainingMode
    channels: int
    folded: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        backbone = Backbone(
            self.architecture, self.mode, endpoints=("layer7_0",), folded=self.folded
        )
        nn.share_scope(self, backbone)
        features = backbone(images, train)["layer7_0"]
        return nn.Dense(self.channels, name="colour")(features.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class MeanColour(Task):
    """The mean red, green and blue of an image, in grey levels divided by 255."""

    Head: ClassVar[type] = Head
    figures: ClassVar[tuple[str, ...]] = ("close",)
    columns: ClassVar[tuple[str, ...]] = ("red", "green", "blue")
    needs_rows: ClassVar[bool] = True

    @classmethod
    def for_training(cls, settings: Mapping[str, Any], source: Source | None) -> "MeanColour":
        return cls(head=Head(settings["model.channels"]))

    def network(
        self, backbone: spec.Backbone, mode: spec.TrainingMode, *, folded: bool = False
    ) -> MeanColourNetwork:
        return MeanColourNetwork(backbone, mode, self.head.channels, folded)

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        return {
            "image": ArraySpec((*size, 3), np.uint8),
            "colour": ArraySpec((3,), np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        images = np.stack([sample.image for sample in samples])
        return {"image": images, "colour": images.mean((1, 2)).astype(np.float32) / 255}

    def augment(self, key: jax.Array, batch: Batch) -> Batch:
        swapped = jax.random.bernoulli(key)  # red and blue, in the image and in its target
        turned = {name: array[..., ::-1] for name, array in batch.items()}
        return jax.tree.map(lambda a, b: jnp.where(swapped, a, b), turned, dict(batch))

    def loss(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        off = jnp.abs(outputs - batch["colour"])
        return jnp.square(off).mean(), {"levels": 255 * off.mean()}

    def evaluate(
        self, outputs: jax.Array, batch: Batch
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        off = jnp.where(batch["mask"][:, None], outputs - batch["colour"], 0)
        sums = {"loss": jnp.square(off).mean(1).sum(), "off": off.sum(0)}  # () and (3,)
        return sums, {"levels": 255 * jnp.abs(off).max(1), "predicted": outputs}

    def summarize(
        self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], source: Source
    ) -> Summary:
        examples = int(sums["examples"])
        assert rows["predicted"].shape == (examples, 3)
        assert len(source) == examples
        result = {
            "close": 100 * float((rows["levels"] < CLOSE).mean()),
            "off": (255 * sums["off"] / examples).tolist(),
            "loss": float(sums["loss"]) / examples,
            "examples": examples,
        }
        return Summary(result)

    def merge(self, outputs: Sequence[jax.Array]) -> jax.Array:
        return (outputs[0] + outputs[1]) / 2

    def record(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"levels": float(row["levels"])}

    def decode(self, outputs: np.ndarray, frames: Sequence[Frame]) -> list[dict[str, Any]]:
        pairs = zip(outputs, frames, strict=False)
        return [{"colour": (255 * row).tolist(), "size": frame.size} for row, frame in pairs]

    def entries(self, prediction: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, map(round, prediction["colour"]), strict=True))]

    def draw(self, picture: Image.Image, prediction: Mapping[str, Any], limit: int) -> Image.Image:
        return Image.new("RGB", picture.size, tuple(map(round, prediction["colour"])))


CONFIG = """
from mbv2_jax.configs import default

def get_config():
    config = default.get_config("tests.tasks.test_own_task:MeanColour")
    config.batch_size = 120
    config.num_epochs = 2.0
    config.model.width = 0.1
    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 16
    config.data.train_transforms = "resize(size)|random_crop(size, padding=2)"
    config.data.eval_transforms = "resize(size)"
    config.optimizer.name = "adamw"
    config.schedule.base_lr = 1e-2
    config.ema.decay = 0.5
    config.checkpoint.every_steps = 12
    config.log.every_steps = 4
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("own_task")
    (folder / "colour.py").write_text(CONFIG)
    Image.new("RGB", (40, 30), (200, 200, 200)).save(folder / "light.png")
    Image.new("RGB", (20, 30), (60, 60, 60)).save(folder / "dark.png")
    return folder


def train(cache: pathlib.Path, folder: pathlib.Path, name: str, *arguments: str) -> dict[str, Any]:
    status, out, err = commands.run(
        cache,
        f"--config={folder / 'colour.py'}",
        f"--workdir={folder / name}",
        f"--config.data.data_dir={folder / 'data'}",
        *arguments,
    )
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_task_of_ones_own_trains_evaluates_continues_and_predicts(cache, folder):
    result = train(cache, folder, "whole")
    assert set(result) == {"close", "off", "loss", "examples"}
    assert result["examples"] == 360
    assert len(result["off"]) == 3

    # Stopped after an epoch and continued, it is the run that was never stopped, to the bit.
    train(cache, folder, "halves", "--config.num_epochs=1.0")
    assert train(cache, folder, "halves") == result
    whole, halves = (commands.metrics(folder / name) for name in ("whole", "halves"))
    assert {line["split"] for line in whole} == {"train", "eval"}
    assert [line for line in whole if line["step"] > 12] == [
        line for line in halves if line["step"] > 12
    ]
    assert (folder / "whole" / "curves.png").is_file()

    # The model directory evaluates to the same result, and knows its task.
    model, out_file = folder / "whole" / "model", folder / "rows.jsonl"
    evaluated = train(
        cache, folder, "whole", "--mode=eval", f"--checkpoint={model}", f"--out={out_file}"
    )
    assert evaluated == result
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert len(rows) == 360
    assert 100 * np.mean([row["levels"] < CLOSE for row in rows]) == evaluated["close"]

    # Predictions are in the task's own words, and its own picture is written.
    status, out, err = commands.run(
        cache,
        str(folder / "light.png"),
        str(folder / "dark.png"),
        f"--checkpoint={folder / 'whole'}",
        f"--show-dir={folder / 'shown'}",
        module="tests.support.short_predict",
    )
    assert status == 0, err
    header, light, dark = out.splitlines()
    assert header.split() == ["image", "rank", "red", "green", "blue"]
    assert int(light.split()[2]) > int(dark.split()[2])
    assert Image.open(folder / "shown" / "dark.png").size == (20, 30)
