"""Products of few rows with dense weights on a CUDA device.

Purpose: launch the kernels where they are ahead of torch's product.
Does not know: modules.
Invariant: no host synchronization and no allocation but the result's, so a launch can be captured in a CUDA
graph; which kernel runs follows from the number of rows and the weight's shape.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton

from memory_efficient_gpt.triton_kernels.availability import can_overlap, overlap_options
from memory_efficient_gpt.triton_kernels.dense_rows import dense_few_rows_kernel, one_row_kernel

MOST_ROWS: Final = 8
"""Beyond them torch's product was as fast on an H200."""
DTYPES: Final = (torch.bfloat16, torch.float16)
_ONE_ROW_SPAN: Final = 4096
_ONE_ROW_AHEAD: Final = 8192
"""Bytes of a row: of one step of its program, and fetched ahead."""
_BYTES_OF_WARP: Final = 512
_OUTPUTS: Final = 16
_WARPS: Final = 4
_SPAN: Final = 256
"""Bytes of a warp's span."""
_STAGES: Final = 3
_ALIGNMENT: Final = 16


def takes(rows: int, weight: torch.Tensor) -> bool:
    """Whether `few_rows_linear` takes so many rows and weight `[N, K]`, and should be ahead of torch."""
    aligned = weight.stride(0) * weight.element_size() % _ALIGNMENT == 0 == weight.data_ptr() % _ALIGNMENT
    whole = weight.shape[1] * weight.element_size() % _ALIGNMENT == 0  # what is fetched ahead
    adjacent = weight.stride(1) == 1 and weight.shape[0] > 0 and weight.shape[1] > 0 and whole
    known = weight.dtype in (*DTYPES, torch.float8_e4m3fn)
    return 0 < rows <= MOST_ROWS and aligned and adjacent and known and can_overlap(weight.device)


@dataclass(frozen=True, slots=True)
class Scales:
    """What sums are multiplied by: rows `[M]` and outputs `[N]`, float32."""

    rows: torch.Tensor
    outputs: torch.Tensor


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x `[..., K]` times weight `[N, K]` transposed, times the scales, plus bias `[N]`: `[..., N]`.

    x and weight in 16 bits or fp8 (e4m3), as `takes` says; dtype: the result's (16 bits), if not x's.
    Sums are float32. A row's result is that of the row alone only among counts of rows with the same kernel:
    one, or several.
    """
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    (m, k), n = rows.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    row_scales, output_scales = (scales.rows, scales.outputs) if scales is not None else (rows, rows)
    tensors = (rows, weight, row_scales, output_scales, rows if bias is None else bias, out)
    flags = dict(
        has_scales=scales is not None, has_bias=bias is not None, **overlap_options(x.device)
    )  # fmt: skip
    fetching, item = 2 * _processors(x.device), weight.element_size()
    with torch.cuda.device(x.device):
        if m == 1 and item > 1:  # fp8 is converted too slowly outside of tensor cores' operands
            span = min(_ONE_ROW_SPAN // item, triton.next_power_of_2(k))
            one_row_kernel[(n,)](
                *tensors, k, weight.stride(0), min(k * item, _ONE_ROW_AHEAD), fetching, even=k % span == 0,
                BK=span, num_warps=max(1, min(4, span * item // _BYTES_OF_WARP)), **flags,
            )  # fmt: skip
        else:
            span = _SPAN // item
            step = _WARPS * span
            dense_few_rows_kernel[(-(-n // _OUTPUTS), 1)](
                *tensors, m, n, k, weight.stride(0), min(k, step) * item, fetching, even=k % step == 0,
                BN=_OUTPUTS, BM=max(8, triton.next_power_of_2(m)), W=_WARPS, BK=span, num_warps=_WARPS,
                num_stages=_STAGES + (item == 1), **flags,
            )  # fmt: skip
    return out.view(*x.shape[:-1], n)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
