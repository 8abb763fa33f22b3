"""Models that no layout can hold are refused; tests/parity/test_export.py compares the others."""

import dataclasses

import pytest

from mbv2_jax.convert import writer
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from tests.support import tiny_model


def test_a_model_for_another_task_is_refused(tmp_path):
    spec = dataclasses.replace(tiny_model.SPEC, task="colours")
    saved = SavedModel(**tiny_model.variables(), description=Description(spec, ()), path=tmp_path)
    for to, name in (("safetensors", "m.safetensors"), ("torchvision", "m.pth")):
        with pytest.raises(UserError, match=r"for colours, which --to=\w+ does not write$"):
            writer.write(saved, to, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
