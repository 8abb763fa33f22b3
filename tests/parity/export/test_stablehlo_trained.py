"""StableHLO files of trained networks, beside JAX on photos."""

import pytest

from mbv2_jax import inference
from mbv2_jax.export import formats, photos, report, stablehlo
from mbv2_jax.export.formats import Options
from mbv2_jax.export.program import Program

WEIGHTS = {
    "classification": "weights/mm_mobilenet_v2.pth",
    "detection": "golden/ssdlite_tf/frozen_inference_graph.pb",
    "segmentation": "golden/deeplab_tf/deeplabv3_257_mv_gpu.tflite",
}


@pytest.mark.parametrize("task", list(WEIGHTS))
def test_a_file_agrees_with_jax_on_photos(task, check_data, tmp_path):
    program = Program(inference.open_model(check_data / WEIGHTS[task], seed=0), 4)
    stablehlo.write(program, tmp_path / "m.stablehlo", Options())
    images = photos.load(program, [str(check_data / "data" / "imagenet_val20")], "--check")
    assert len(images) == 20
    found = report.make(
        program, tmp_path / "m.stablehlo", "stablehlo", formats.find("stablehlo"), "float32", images
    )
    found.check()
    # XLA's own convolutions and those of ops/cpu sum in another order; float32 rounds at 6e-8.
    assert max(found.difference.values()) < 1e-3
    assert found.agreement is None or found.agreement > 0.999
