"""Products of few rows with dense weights: the kernels against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64), (96, 136), (4096, 1024), (300, 2048), (130, 4104), (16, 14336)]
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Of the norm: one rounding of each result."""


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_results_are_the_products(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    from memory_efficient_gpt.triton_kernels.dense import few_rows_linear

    outputs, inputs = shape
    weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype)
    bias = torch.randn(outputs, device="cuda", dtype=dtype)
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
    want = x.double() @ weight.double().t()
    assert distance(few_rows_linear(x, weight), want) < TOLERANCES[dtype]
    assert distance(few_rows_linear(x, weight, bias), want + bias.double()) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_fp8_codes_times_fp8_codes_are_scaled_by_row_and_output(shape: tuple[int, int], rows: int) -> None:
    from memory_efficient_gpt.triton_kernels.dense import Scales, few_rows_linear

    outputs, inputs = shape[0], shape[1] // 16 * 16
    weight = (torch.randn(outputs, inputs, device="cuda") * 50).to(torch.float8_e4m3fn)
    x = (torch.randn(rows, inputs, device="cuda") * 50).to(torch.float8_e4m3fn)
    scales = Scales(torch.rand(rows, device="cuda") + 0.5, torch.rand(outputs, device="cuda") + 0.5)
    got = few_rows_linear(x, weight, scales=scales, dtype=torch.bfloat16)
    want = x.double() @ weight.double().t() * scales.rows.double()[:, None] * scales.outputs.double()
    assert got.dtype is torch.bfloat16
    assert distance(got, want) < TOLERANCES[torch.bfloat16]


def test_a_row_among_several_gives_the_same_bits_wherever_it_is() -> None:
    from memory_efficient_gpt.triton_kernels.dense import few_rows_linear

    weight = torch.randn(512, 1536, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8, 1536, device="cuda", dtype=torch.bfloat16)
    whole = few_rows_linear(x, weight)
    for rows in range(2, 8):
        assert torch.equal(few_rows_linear(x[-rows:], weight), whole[-rows:])


def test_a_part_of_a_larger_weight_is_read_where_it_lies() -> None:
    from memory_efficient_gpt.triton_kernels.dense import few_rows_linear, takes

    whole = torch.randn(300, 2048, device="cuda", dtype=torch.bfloat16)
    part = whole[100:200, :1024]
    assert takes(2, part)
    for rows in (1, 4):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        assert distance(few_rows_linear(x, part), x.double() @ part.double().t()) < 6e-3


def test_weights_that_the_kernels_cannot_read_are_torchs() -> None:
    from memory_efficient_gpt.triton_kernels.dense import MOST_ROWS, takes
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    weight = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    assert not takes(MOST_ROWS + 1, weight)
    assert not takes(1, weight.t())
    assert not takes(1, weight[:, :100][:, 1:])
    assert not takes(1, weight.float())
    odd = torch.randn(64, 101, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 3, 101, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(TritonKernels().linear(x, odd), nn.functional.linear(x, odd))


def test_kernels_that_begin_early_wait_for_what_they_read() -> None:
    """A long chain whose every product reads the one before, in a graph and without."""
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    kernels = TritonKernels()
    weight = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) / 32
    ones = torch.ones(1024, device="cuda", dtype=torch.bfloat16)

    def chain(x: torch.Tensor, *, plain: bool) -> torch.Tensor:
        for _ in range(60):
            normed = nn.functional.rms_norm(x.float(), (1024,), None, 1e-6).to(x.dtype) if plain else (
                kernels.rms_norm(x, ones, 1e-6)
            )  # fmt: skip
            x = nn.functional.linear(normed, weight) if plain else kernels.linear(normed, weight)
        return x

    for rows in (1, 8):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        eager = chain(x, plain=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x, plain=False)
        for _ in range(20):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, eager)
        steps = float((eager - chain(x, plain=True)).float().norm() / eager.float().norm())
        assert steps < 0.2  # sixty roundings in another order, of numbers that are normed each time
