"""Products with quantized weights on a CUDA device.

Purpose: launch the kernels: choose the tile, own the workspace, fall back on a dense product where it wins.
Does not know: modules, schemes' names.
Invariant: no host synchronization and no allocation but the result's and, for dense products, the weight's;
so a launch can be captured in a CUDA graph once its tile was used before.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from memory_efficient_gpt.triton_kernels.availability import overlap_options
from memory_efficient_gpt.triton_kernels.dequantize import dequantize_kernel
from memory_efficient_gpt.triton_kernels.few_rows import few_rows_kernel
from memory_efficient_gpt.triton_kernels.matmul import quantized_matmul_kernel
from memory_efficient_gpt.triton_kernels.packing import SPAN, TritonWeight, contiguous
from memory_efficient_gpt.triton_kernels.tiles import Tile, choose_tile, fixed_tile

DTYPES: Final = (torch.bfloat16, torch.float16)
"""Of x, for the fused kernel; other ones are multiplied densely."""
_DEQUANTIZE_ROWS: Final = 64
_LEAST_SUMS: Final = 1 << 20
_LEAST_COUNTERS: Final = 4096


@dataclass(slots=True)
class _Workspace:
    """Partial sums and counters of split products; of one stream, in which they follow each other."""

    partial: torch.Tensor
    counters: torch.Tensor


_workspaces: dict[tuple[torch.device, int], list[_Workspace]] = {}


def quantized_linear(
    x: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None = None, *, tile: Tile | None = None
) -> torch.Tensor:
    """x `[..., K]` times the weight transposed, plus bias `[N]`: `[..., N]` in x's dtype.

    tile: what to use instead of the table's choice (benchmarks and tests). A weight that is deterministic
    takes x in 16 bits only.
    """
    rows = x.reshape(-1, weight.num_inputs)
    weight = weight if weight.codes.is_contiguous() else contiguous(weight)
    if tile is None and x.dtype in DTYPES:
        tile = _tile(weight, len(rows), x.device)
    if tile is None or len(rows) == 0:
        return functional.linear(x, dequantize(weight, x.dtype), bias)
    return _launch(rows, weight, bias, tile).view(*x.shape[:-1], weight.num_outputs)


def dequantize(weight: TritonWeight, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The weight `[N, K]`, or its outputs `rows` `[T] int64`: `[T, K]`."""
    weight = weight if weight.codes.is_contiguous() else contiguous(weight)
    count = weight.num_outputs if rows is None else rows.numel()
    out = torch.empty((count, weight.num_inputs), dtype=dtype, device=weight.codes.device)
    if count == 0:
        return out
    block = _DEQUANTIZE_ROWS if count >= _DEQUANTIZE_ROWS else 16
    with torch.cuda.device(out.device):
        dequantize_kernel[(weight.codes.shape[0], -(-count // block))](
            weight.codes, weight.scales, weight.offsets if weight.offsets is not None else weight.scales,
            rows if rows is not None else weight.codes, out, count, weight.num_inputs, weight.codes.shape[1],
            weight.unit, code=weight.code, group=weight.group_size or 0,
            asymmetric=weight.offsets is not None, selected=rows is not None, BN=block, num_warps=4,
        )  # fmt: skip
    return out


def _tile(weight: TritonWeight, rows: int, device: torch.device) -> Tile | None:
    major, processors = _processor(device)
    if weight.deterministic:
        return fixed_tile(weight.num_outputs, rows, major=major)
    return choose_tile(
        weight.code, weight.group_size, weight.num_outputs, weight.num_inputs, rows,
        major=major, processors=processors,
    )  # fmt: skip


@functools.cache
def _processor(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def _launch(rows: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    rows = rows.contiguous()
    m, k = rows.shape
    spans, padded, _ = weight.codes.shape
    splits = min(tile.splits, spans)
    per_split = -(-spans // splits)
    splits = -(-spans // per_split)
    grid = (-(-m // tile.rows), padded // tile.outputs, splits)
    out = torch.empty((m, weight.num_outputs), dtype=rows.dtype, device=rows.device)
    work = _workspace(rows.device, grid[0] * grid[1], splits * tile.outputs * tile.rows if splits > 1 else 0)
    arguments = (
        rows, weight.codes, weight.scales, weight.offsets if weight.offsets is not None else weight.scales,
        bias if bias is not None else rows, out, work.partial, work.counters,
        m, weight.num_outputs, k, k, padded, spans, per_split, weight.unit,
    )  # fmt: skip
    constants = dict(
        code=weight.code, group=weight.group_size or 0, asymmetric=weight.offsets is not None,
        has_bias=bias is not None, even_k=k % SPAN == 0, splits=splits, BN=tile.outputs, BM=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=not weight.deterministic,  # compilers may fuse otherwise in another tile
        **overlap_options(rows.device),
    )  # fmt: skip
    with torch.cuda.device(rows.device):
        if tile.few_rows:
            few_rows_kernel[grid](*arguments, **constants, W=tile.warps)
        else:
            quantized_matmul_kernel[grid](*arguments, **constants)
    return out


def _workspace(device: torch.device, tiles: int, sums_per_tile: int) -> _Workspace:
    """At least so large. One that was outgrown is kept: a captured graph may write to it."""
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    owned = _workspaces.setdefault(key, [])
    if not owned or owned[-1].partial.numel() < tiles * sums_per_tile or owned[-1].counters.numel() < tiles:
        last = owned[-1] if owned else None
        sums = max(tiles * sums_per_tile, 2 * last.partial.numel() if last else _LEAST_SUMS)
        counters = max(tiles, 2 * last.counters.numel() if last else _LEAST_COUNTERS)
        owned.append(
            _Workspace(
                torch.empty(sums, dtype=torch.float32, device=device),
                torch.zeros(counters, dtype=torch.int32, device=device),
            )
        )
    return owned[-1]
