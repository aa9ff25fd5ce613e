"""Products with dense weights on a CUDA device: of few rows, or of any number of them in one order of sums.

Purpose: launch the kernels where they are ahead of torch's product, or where a row's result must not depend
on how many others there are ("deterministic").
Does not know: modules.
Invariant: no host synchronization and no allocation but the result's, so a launch can be captured in a CUDA
graph; which kernel runs follows from the number of rows and the weight's shape. Deterministic ones are all of
one kernel, W and BK: larger tiles change which program computes a sum, not its order.

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


@dataclass(frozen=True, slots=True)
class _RowTile:
    """outputs and rows of a program; pieces: in which a warp's span is read; together: tiles of rows that
    share weights in the L2 cache."""

    outputs: int
    rows: int
    pieces: int
    stages: int
    together: int = 1


_ROW_TILES: Final = (
    _RowTile(_OUTPUTS, 8, 1, _STAGES),
    _RowTile(_OUTPUTS, 16, 1, _STAGES),
    _RowTile(32, 32, 2, _STAGES),
    _RowTile(32, 64, 4, _STAGES + 1),
    _RowTile(64, 64, 4, _STAGES, together=8),
)
"""For deterministic products: the first that has room for all rows, the last for any number. Any outputs,
rows and stages give the same sums, and so do pieces that leave a warp 16 inputs (fp8: 32) or more at once."""


def takes(rows: int, weight: torch.Tensor, *, deterministic: bool = False) -> bool:
    """Whether `few_rows_linear` takes so many rows and weight `[N, K]`, and should be ahead of torch.

    deterministic: whether it takes them at all.
    """
    aligned = weight.stride(0) * weight.element_size() % _ALIGNMENT == 0 == weight.data_ptr() % _ALIGNMENT
    whole = weight.shape[1] * weight.element_size() % _ALIGNMENT == 0  # what is fetched ahead
    adjacent = weight.stride(1) == 1 and weight.shape[0] > 0 and weight.shape[1] > 0 and whole
    known = weight.dtype in (*DTYPES, torch.float8_e4m3fn)
    if not (rows > 0 and aligned and adjacent and known):
        return False
    return deterministic or (rows <= MOST_ROWS and can_overlap(weight.device))


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
    deterministic: bool = False,
) -> torch.Tensor:
    """x `[..., K]` times weight `[N, K]` transposed, times the scales, plus bias `[N]`: `[..., N]`.

    x and weight in 16 bits or fp8 (e4m3), as `takes` says; dtype: the result's (16 bits), if not x's.
    Sums are float32. A row's result is that of the row alone only among counts of rows with the same kernel:
    one, or several. deterministic: any number of rows, and a row's result never depends on it.
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
        if m == 1 and item > 1 and not deterministic:  # fp8 is converted too slowly outside of tensor cores
            span = min(_ONE_ROW_SPAN // item, triton.next_power_of_2(k))
            one_row_kernel[(n,)](
                *tensors, k, weight.stride(0), min(k * item, _ONE_ROW_AHEAD), fetching, even=k % span == 0,
                BK=span, num_warps=max(1, min(4, span * item // _BYTES_OF_WARP)), **flags,
            )  # fmt: skip
            return out.view(*x.shape[:-1], n)
        tile = next((t for t in _ROW_TILES if m <= t.rows), _ROW_TILES[-1])
        span = _SPAN // item
        step = _WARPS * span
        dense_few_rows_kernel[(-(-n // tile.outputs), -(-m // tile.rows))](
            *tensors, m, n, k, weight.stride(0), min(k, step) * item,
            fetching if m <= tile.rows else 0, even=k % step == 0, BN=tile.outputs, BM=tile.rows, W=_WARPS,
            BK=span, BI=span // tile.pieces, together=tile.together, num_warps=_WARPS,
            num_stages=tile.stages + (item == 1 and tile.pieces == 1),
            enable_fp_fusion=not deterministic,  # compilers may fuse otherwise in another tile
            **flags,
        )  # fmt: skip
    return out.view(*x.shape[:-1], n)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
