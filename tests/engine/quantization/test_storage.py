"""What stored tensors mean, byte by byte."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.storage import (
    QuantizedWeight,
    choose_unit,
    pack_nibbles,
    unpack_nibbles,
)


def test_the_even_input_is_in_the_low_half_of_a_byte() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_nibbles_come_back(width: int) -> None:
    codes = torch.randint(0, 16, (5, width), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, (width + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, width), codes)


def test_a_symmetric_weight_is_the_scale_times_the_code_less_eight() -> None:
    codes = pack_nibbles(torch.tensor([[0, 8, 15]]))
    scales = torch.tensor([[0.5]]).half()
    weight = QuantizedWeight(parse_scheme("int4"), 3, codes, scales, None, torch.tensor(2.0))
    assert weight.dequantize().tolist() == [[-8.0, 0.0, 7.0]]


def test_an_asymmetric_weight_is_the_scale_times_the_code_less_the_offset() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64)
    scales, offsets = torch.tensor([[0.5, 0.25]]).half(), torch.tensor([[1.0, -2.0]]).half()
    weight = QuantizedWeight(parse_scheme("int8-asym-g32"), 64, codes, scales, offsets, torch.tensor(1.0))
    want = torch.cat((torch.arange(32) * 0.5 - 1.0, torch.arange(32, 64) * 0.25 + 2.0))
    assert torch.equal(weight.dequantize(), want.view(1, 64))


def test_selected_rows_are_rows_of_the_whole() -> None:
    codes = torch.randint(0, 256, (4, 40), dtype=torch.uint8)
    rows = torch.tensor([3, 3, 0])
    for scale_rows in (4, 1):
        scales = torch.rand(scale_rows, 1).half()
        scheme = parse_scheme("int8" if scale_rows == 4 else "int8-tensor")
        weight = QuantizedWeight(scheme, 40, codes, scales, None, torch.tensor(1.0))
        assert torch.equal(weight.select(rows).dequantize(), weight.dequantize()[rows])


@pytest.mark.parametrize("largest", [1e-30, 3e-8, 0.01, 1.0, 1e5, 1e30])
def test_the_unit_brings_the_largest_scale_into_float16s_range(largest: float) -> None:
    unit = choose_unit(largest)
    assert 2.0**-4 <= largest / unit < 2.0**-3
    assert torch.frexp(torch.tensor(unit, dtype=torch.float64))[0] == 0.5  # a power of two


def test_zero_and_infinity_have_a_harmless_unit() -> None:
    assert choose_unit(0.0) == choose_unit(float("inf")) == 1.0
