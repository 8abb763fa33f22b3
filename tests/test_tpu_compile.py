"""benchmarks/tpu_compile.py adds up a compiled program's bytes as one does by hand."""

import pytest

from benchmarks import tpu_compile

# As libtpu writes it: S(1) is the memory on the chip. A fusion of 4 x 8 bfloat16 and 8 float32
# makes 4 x 8 bfloat16 on the chip and 8 float32; the former is copied to HBM; of a parameter one
# half is fetched; all-reduce sums the latter.
PROGRAM = """HloModule jit_step

%fused (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %inner = bf16[4,8]{1,0} negate(%p)
}

ENTRY %main (x: bf16[4,8], w: f32[8]) -> (bf16[4,8], f32[8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[8]{0:T(128)} parameter(1)
  %fusion.1 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[8]{0:T(128)}) fusion(%x, %w), kind=kOutput, \
calls=%fused, metadata={op_name="jit(step)/transpose(jvp(Net))/conv/conv_general_dilated"}
  %get-tuple-element.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.1), index=0
  %get-tuple-element.2 = f32[8]{0:T(128)} get-tuple-element(%fusion.1), index=1
  %copy-start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) \
copy-start(%get-tuple-element.1)
  %copy-done = bf16[4,8]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
  %slice-start = ((bf16[4,8]{1,0:T(8,128)(2,1)}), bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:2], [0:8]}
  %slice-done = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %all-reduce = f32[8]{0:T(128)} all-reduce(%get-tuple-element.2), \
metadata={op_name="jit(step)/add"}
  ROOT %tuple = (bf16[4,8]{1,0}, f32[8]{0}) tuple(%copy-done, %all-reduce)
}
"""


def test_operations_are_added_up():
    found = tpu_compile.operations(PROGRAM)
    assert [operation.opcode for operation in found] == [
        "fusion",
        "copy-start",
        "slice-start",
        "all-reduce",
    ]
    # In and out: 64 + 32 and 64 + 32; 64 and 64; 32 and 32; 32 and 32.
    assert [operation.size for operation in found] == [192, 128, 64, 64]
    # Without the fusion's result on the chip, and the copies' side there.
    assert [operation.hbm for operation in found] == [128, 64, 32, 64]

    sums = tpu_compile.summary(found, images=2)
    megabyte = 2e6
    assert sums == {
        "operations": pytest.approx(256 / megabyte),
        "HBM": pytest.approx(288 / megabyte),
        "backward conv_general_dilated": pytest.approx(192 / megabyte),
        "moves between HBM and chip": pytest.approx(192 / megabyte),
        "forward add": pytest.approx(64 / megabyte),
    }


def test_the_largest_come_first_and_what_is_on_the_chip_is_marked(monkeypatch):
    monkeypatch.setattr(tpu_compile, "WORTH_NAMING", 10)
    lines = tpu_compile.table(tpu_compile.operations(PROGRAM), images=1, top=1).splitlines()
    assert lines[0].endswith("jit(step)/transpose(jvp(Net))/conv/conv_general_dilated")
    assert lines[1].strip() == "bf16[4,8] f32[8] -> bf16[4,8]* f32[8]"
