"""The layout of quantized weights for the Triton kernels; the kernels themselves are in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton, stored_layout
from memory_efficient_gpt.triton_kernels.packing import SPAN, Code, codes_of, obstacle, pack, unpack

SCHEMES = [
    "int4", "int4-g64", "int4-g128", "int4-channel", "int4-tensor", "int4-asym-g64", "int8", "int8-g64",
    "int8-asym", "int8-tensor", "fp8",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(96, 80), (208, 300), (1, 7), (128, 256)])
def test_a_weight_comes_back_as_it_was_stored(name: str, shape: tuple[int, int]) -> None:
    weight = quantize_weight(torch.randn(*shape), parse_scheme(name), rounding="nearest")
    again = stored_layout(weight.scheme, pack_for_triton(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())
    for stored, returned in zip(weight.tensors().values(), again.tensors().values(), strict=True):
        assert stored.dtype is returned.dtype and stored.shape == returned.shape


@pytest.mark.parametrize(("code", "width"), [("int4", 32), ("int8", 64)])
def test_the_bits_of_a_word_are_the_codes_of_the_documented_inputs(code: Code, width: int) -> None:
    bits = 16 * width // SPAN
    codes = torch.randint(0, 1 << bits, (3, 2 * SPAN), dtype=torch.uint8)
    packed = pack(code, codes, torch.ones(3, 1).half(), None, 1.0, group_size=None)
    assert packed.codes.shape == (2, 128, width)
    for span, output, word in ((0, 0, 0), (1, 2, 5), (0, 1, width - 1)):
        value = int(packed.codes[span, output, word]) & 0xFFFF
        for j in range(16 // bits):
            want = int(codes[output, span * SPAN + j * width + word])
            assert (value >> (bits * j)) & ((1 << bits) - 1) == want


def test_rows_are_found_in_any_order() -> None:
    codes = torch.randint(0, 16, (40, 200), dtype=torch.uint8)
    packed = pack("int4", codes, torch.ones(40, 1).half(), None, 1.0, group_size=None)
    rows = torch.tensor([39, 0, 7, 7])
    assert torch.equal(codes_of(packed, rows), codes[rows])


def test_padding_has_no_weight() -> None:
    codes = torch.full((5, 130), 15, dtype=torch.uint8)
    packed = pack("int4", codes, torch.ones(5, 5).half(), torch.ones(5, 5).half(), 1.0, group_size=32)
    assert packed.scales.shape == (8, 128)
    assert not packed.scales[:, 5:].any() and not packed.scales[5:].any()
    assert packed.offsets is not None and not packed.offsets[5:].any()
    assert torch.equal(unpack(packed)[0], codes)


@pytest.mark.parametrize(
    ("code", "group_size", "fits"),
    [("int4", 32, True), ("int4", 16, False), ("int4", 96, False), ("int4", 256, True), ("int8", 64, True),
     ("int8", 32, False), ("int8", None, True)],
)  # fmt: skip
def test_groups_that_end_inside_of_a_slice_are_refused(
    code: Code, group_size: int | None, fits: bool
) -> None:
    assert (obstacle(code, group_size) is None) is fits
    if not fits:
        with pytest.raises(ValueError, match=f"groups of {group_size}"):
            pack(
                code,
                torch.zeros(4, 256, dtype=torch.uint8),
                torch.ones(4, 8).half(),
                None,
                1.0,
                group_size=group_size,
            )
