"""Rows rounded to fp8 (e4m3), each with a scale of its own, in one pass.

Purpose: the kernel that prepares inputs for products of fp8 with fp8.
Does not know: weights.
Invariant: a row's result depends on that row alone.

Letters: M rows, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.availability import overlap_options
from memory_efficient_gpt.triton_kernels.overlap import follow

MOST_INPUTS = 1 << 16


def rows_to_fp8(rows: torch.Tensor, largest: float, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[M, K]` as codes `[M, K] float8_e4m3fn` and scales `[M, 1] float32`: row = scale * code."""
    rows = rows.contiguous()
    m, k = rows.shape
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(k)
    with torch.cuda.device(rows.device):
        rows_to_fp8_kernel[(m,)](
            rows,
            codes,
            scales,
            k,
            largest,
            least,
            BLOCK=block,
            num_warps=8 if block > 2048 else 4,
            **overlap_options(rows.device),
        )
    return codes, scales


@triton.jit
def rows_to_fp8_kernel(x, codes, scales, K, largest, least, BLOCK: tl.constexpr, early: tl.constexpr):
    """Grid (M). early: launched while the kernel before still runs."""
    follow(early)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers)), least) / largest
    scaled = tl.minimum(tl.maximum(tl.div_rn(numbers, scale), -largest), largest)
    tl.store(codes + row * K + k, scaled.to(tl.float8e4nv), mask=k < K)
    tl.store(scales + row, scale)
