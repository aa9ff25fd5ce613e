"""Products of fp8 weights with inputs that are rounded to fp8 as they come.

Purpose: what the scheme fp8-dynamic means, and how a GPU that multiplies fp8 computes it.
Does not know: modules, how weights were rounded.
Invariant: wherever it runs, inputs are rounded alike: token by token, its largest element becoming 448. So
rounding does not depend on the batch; devices, and numbers of rows on one, differ by the order of sums only.

Letters: M rows (tokens), N outputs, K inputs.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch.nn import functional

from memory_efficient_gpt.quantization.storage import QuantizedWeight
from memory_efficient_gpt.triton_kernels.availability import triton_obstacle

FP8_MAX: Final = 448.0
_LEAST: Final = 1e-12
_FP8_CAPABILITY: Final = (8, 9)
_MULTIPLE: Final = 16  # of outputs and inputs, for torch's fp8 product


def fp8_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    weight_scales: torch.Tensor | None = None,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """x `[..., K]`, rounded to fp8, times weight `[N, K]` transposed, plus bias: `[..., N]` in x's dtype.

    weight_scales: `output_scales(weight)`, if the caller keeps them. deterministic: on a GPU, by one kernel
    for any number of rows, where `keeps_one_order`.
    """
    rows = x.reshape(-1, weight.num_inputs)
    if not multiplies_fp8(x.device) or torch.is_grad_enabled() or not _fits(rows, weight):
        return functional.linear(_rounded(x), weight.dequantize(x.dtype), bias)
    by_kernel = triton_obstacle(x.device) is None
    codes, scales = _to_fp8_by_kernel(rows) if by_kernel else to_fp8(rows)
    weight_scales = output_scales(weight) if weight_scales is None else weight_scales
    if (
        by_kernel
        and (
            few := _few_rows_product(codes, scales, weight.codes, weight_scales, bias, x.dtype, deterministic)
        )
        is not None
    ):
        return few.view(*x.shape[:-1], weight.num_outputs)
    result = torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scales, scale_b=weight_scales, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    result = result.to(x.dtype)
    return (result if bias is None else result + bias).view(*x.shape[:-1], weight.num_outputs)


def keeps_one_order(weight: QuantizedWeight) -> bool:
    """Whether `fp8_linear` can be deterministic with such a weight `[N, K]`, for inputs in 16 bits."""
    device = weight.codes.device
    if not multiplies_fp8(device) or triton_obstacle(device) is not None:
        return False
    from memory_efficient_gpt.triton_kernels.dense import takes
    from memory_efficient_gpt.triton_kernels.fp8_rows import MOST_INPUTS

    fits = _fits(weight.codes[:1], weight) and weight.num_inputs <= MOST_INPUTS
    return fits and takes(1, weight.codes, deterministic=True)


def output_scales(weight: QuantizedWeight) -> torch.Tensor:
    """What each output's codes are to be multiplied by: `[1, N] float32`, for one scale an output."""
    return (weight.scales.float() * weight.unit).view(1, -1)


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[M, K]` as codes `[M, K] float8_e4m3fn` and scales `[M, 1] float32`: row = scale * code."""
    numbers = rows.float()
    scales = numbers.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST) / FP8_MAX
    return (numbers / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device's tensor cores take fp8: NVIDIA's since Ada and Hopper."""
    if device.type != "cuda" or vars(torch.version).get("hip") is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def _to_fp8_by_kernel(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from memory_efficient_gpt.triton_kernels.fp8_rows import MOST_INPUTS, rows_to_fp8

    return rows_to_fp8(rows, FP8_MAX, _LEAST) if rows.shape[1] <= MOST_INPUTS else to_fp8(rows)


def _few_rows_product(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, deterministic: bool,
) -> torch.Tensor | None:  # fmt: skip
    """codes `[M, K]` times weight `[N, K]` transposed and scaled: `[M, N]`; None where torch's product is for
    it, which reads few rows' weights at a third of the memory's speed."""
    from memory_efficient_gpt.triton_kernels.dense import DTYPES, Scales, few_rows_linear, takes

    if dtype not in DTYPES or not takes(len(codes), weight, deterministic=deterministic):
        return None
    own = Scales(scales.view(-1), weight_scales.view(-1))
    return few_rows_linear(codes, weight, bias, scales=own, dtype=dtype, deterministic=deterministic)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    codes, scales = to_fp8(x.detach())
    rounded = (codes.float() * scales).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _fits(rows: torch.Tensor, weight: QuantizedWeight) -> bool:
    aligned = weight.num_outputs % _MULTIPLE == 0 and weight.num_inputs % _MULTIPLE == 0
    return aligned and len(rows) > 0 and len(weight.scales) == weight.num_outputs
