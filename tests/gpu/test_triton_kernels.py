"""The Triton kernels against plain products with the dequantized weight."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight
from memory_efficient_gpt.triton_kernels.packing import Code, TritonWeight, pack
from memory_efficient_gpt.triton_kernels.tiles import Tile

pytestmark = pytest.mark.gpu

SCHEMES = [
    "int4", "int4-g64", "int4-g128", "int4-channel", "int4-tensor", "int4-asym-g32", "int4-asym-g64",
    "int4-asym-g128", "int4-asym-channel", "int8", "int8-g64", "int8-g128", "int8-asym", "int8-asym-g64",
    "int8-tensor", "fp8",
]  # fmt: skip
SHAPES = [(96, 80), (208, 300), (128, 256), (1, 130)]
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Of the norm: one rounding of each result."""


def quantized(name: str, outputs: int, inputs: int) -> QuantizedWeight:
    generator = torch.Generator("cuda").manual_seed(outputs * 1000 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator, device="cuda")
    return quantize_weight(weight, parse_scheme(name), rounding="nearest")


def packed(weight: QuantizedWeight) -> TritonWeight:
    code: Code = "fp8" if weight.scheme.kind == "fp8" else "int4" if weight.scheme.bits == 4 else "int8"
    codes = weight.codes.view(torch.uint8) if code == "fp8" else weight.integer_codes()
    return pack(
        code, codes, weight.scales, weight.offsets, float(weight.unit), group_size=weight.scheme.group_size
    )


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_numbers_are_those_of_the_stored_weight(name: str, shape: tuple[int, int]) -> None:
    from memory_efficient_gpt.triton_kernels.linear import dequantize

    weight = quantized(name, *shape)
    rows = torch.tensor([0, shape[0] - 1, shape[0] // 2], device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        want = weight.dequantize(dtype)
        assert torch.equal(dequantize(packed(weight), dtype), want)
        assert torch.equal(dequantize(packed(weight), dtype, rows), want[rows])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_is_that_with_the_dequantized_weight(name: str, dtype: torch.dtype) -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    for outputs, inputs in SHAPES:
        weight = quantized(name, outputs, inputs)
        bias = torch.randn(outputs, dtype=dtype, device="cuda")
        for rows in (1, 7, 40):
            x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
            want = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
            for tile in (
                None,
                Tile(64, 16, 1, 4, 3),
                Tile(128, 32, 2, 8, 3),
                Tile(16, 8, 1, 8, 3, True),
                Tile(32, 16, 2, 4, 2, True),
            ):
                got = quantized_linear(x, packed(weight), bias, tile=tile)
                assert distance(got, want) < TOLERANCES[dtype], (name, outputs, inputs, rows, tile)


def test_split_products_give_the_same_bits_each_time_whatever_ran_between() -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    weight = packed(quantized("int4-g128", 512, 4096))
    x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
    first = quantized_linear(x, weight, tile=Tile(64, 16, 8, 4, 3))
    for splits in (2, 16, 4):
        quantized_linear(torch.randn_like(x), weight, tile=Tile(128, 16, splits, 4, 3))
        assert torch.equal(quantized_linear(x, weight, tile=Tile(64, 16, 8, 4, 3)), first)


def test_a_row_gives_the_same_bits_alone_and_among_others_of_its_tile() -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    weight = packed(quantized("int4", 256, 2048))
    x = torch.randn(16, 2048, dtype=torch.bfloat16, device="cuda")
    tile = Tile(64, 16, 4, 4, 3)
    together = quantized_linear(x, weight, tile=tile)
    for row in range(16):
        assert torch.equal(quantized_linear(x[row : row + 1], weight, tile=tile)[0], together[row])


def test_a_captured_product_computes_with_new_inputs() -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    weight = quantized("int8", 384, 1024)
    x = torch.randn(4, 1024, dtype=torch.bfloat16, device="cuda")
    quantized_linear(x, packed(weight))
    held = packed(weight)
    graph = torch.cuda.CUDAGraph()
    quantized_linear(x, held)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = quantized_linear(x, held)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert distance(out, x.double() @ weight.dequantize(torch.float64).t()) < TOLERANCES[torch.bfloat16]


def test_many_rows_and_other_dtypes_are_multiplied_densely_and_exactly_so() -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    weight = quantized("int4-asym-g64", 128, 256)
    for rows, dtype in ((2000, torch.bfloat16), (3, torch.float32)):
        x = torch.randn(rows, 256, dtype=dtype, device="cuda")
        want = torch.nn.functional.linear(x, weight.dequantize(dtype))
        assert torch.equal(quantized_linear(x, packed(weight)), want)
