"""x times a dense weight transposed, for so few rows that only reading the weight counts.

Purpose: the Triton kernels behind decoding with weights that are not packed: one row, and a few.
Does not know: when they pay (dense.py), modules.
Invariant: a row's result depends on that row only; the order of a sum follows from the kernel, BK and W.

One row: a program an output, whose weights go straight to registers; so many small programs keep the memory
busy without shared memory, and none waits for another. A few rows: a tile of outputs by all rows on tensor
cores; each warp multiplies spans of its own, as in few_rows.py. Both fetch what they read first into the L2
cache while the kernel before still runs. The second one takes any number of rows, where the order of sums
must not depend on it: larger tiles then read a span in pieces.

Letters: M rows, N outputs, K inputs; BN and BM a tile's outputs and rows; W warps, BK inputs of a span, BI of
a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from memory_efficient_gpt.triton_kernels.overlap import prefetch


@triton.jit(do_not_specialize=["ahead", "fetching"])
def one_row_kernel(
    x, weight, row_scales, scales, bias, y, K, stride, ahead, fetching,
    has_scales: tl.constexpr, has_bias: tl.constexpr, even: tl.constexpr, early: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """y `[N]` = x `[K]` times weight `[N, K]` transposed, times row_scales `[1]` and scales `[N]`, plus bias
    `[N]`. Grid (N,).

    stride: elements between the weight's rows. ahead: bytes of a row that the first `fetching` programs fetch
    before they wait. even: BK divides K.
    """
    output = tl.program_id(0)
    row = weight + output.to(tl.int64) * stride
    if early:
        if output < fetching:
            prefetch(row, 0, 1, ahead, 1)
        gdc_wait()
    at = tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        k = start + at
        if even:
            w = tl.load(row + k, eviction_policy="evict_first")
            v = tl.load(x + k)
        else:
            w = tl.load(row + k, mask=k < K, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + k, mask=k < K, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)
    if early:
        gdc_launch_dependents()
    result = tl.sum(total, axis=0)
    if has_scales:
        result *= tl.load(row_scales) * tl.load(scales + output)
    if has_bias:
        result += tl.load(bias + output).to(tl.float32)
    tl.store(y + output, result.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "ahead", "fetching"])
def dense_few_rows_kernel(
    x, weight, row_scales, scales, bias, y, M, N, K, stride, ahead, fetching,
    has_scales: tl.constexpr, has_bias: tl.constexpr, even: tl.constexpr, early: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr,
    together: tl.constexpr,
):  # fmt: skip
    """y `[M, N]` = x `[M, K]` times weight `[N, K]` transposed, times row_scales `[M]` and scales `[N]`, plus
    bias `[N]`.

    Grid (ceil(N / BN), ceil(M / BM)). even: W * BK divides K. together: tiles of rows that read the same
    weights side by side, so that they find them in the L2 cache; the rest as in one_row_kernel.
    """
    item: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    products: tl.constexpr = tl.float16 if item == 1 else y.dtype.element_ty  # fp8 becomes it in one step
    reads_once: tl.constexpr = "evict_first" if together == 1 else ""
    tile, row_tile = tl.program_id(0), tl.program_id(1)
    if together > 1:
        row_tile, tile = tl.swizzle2d(row_tile, tile, tl.num_programs(1), tl.num_programs(0), together)
    rn = tile * BN + tl.arange(0, BN)
    rm = row_tile * BM + tl.arange(0, BM)
    rw = tl.arange(0, W)
    ri = tl.arange(0, BI)
    some_output, some_row = rn < N, rm < M
    if early:
        if tile < fetching:
            start = weight + tile.to(tl.int64) * BN * stride
            prefetch(start, stride * item, tl.minimum(N - tile * BN, BN), ahead, W)
        gdc_wait()
    w_rows = weight + tl.minimum(rn, N - 1).to(tl.int64)[None, :, None] * stride + ri[None, None, :]
    x_rows = x + rm.to(tl.int64)[None, None, :] * K + ri[None, :, None]
    total = tl.zeros([W, BN, BM], tl.float32)
    for start in range(0, tl.cdiv(K, W * BK) * (W * BK), W * BI):
        if BI == BK:
            k = start + rw[:, None, None] * BK
        else:  # piece by piece of the spans that the warps have now
            now = start // (W * BK)
            k = now * (W * BK) + (start - now * (W * BK)) // W + rw[:, None, None] * BK
        if even:
            w = tl.load(w_rows + k, eviction_policy=reads_once)
            v = tl.load(x_rows + k, mask=some_row[None, None, :], other=0.0)
        else:
            w = tl.load(w_rows + k, mask=k + ri[None, None, :] < K, other=0.0, eviction_policy=reads_once)
            v = tl.load(x_rows + k, mask=some_row[None, None, :] & (k + ri[None, :, None] < K), other=0.0)
        total = tl.dot(w.to(products), v.to(products), total)
    if early:
        gdc_launch_dependents()
    result = tl.sum(total, axis=0)
    if has_scales:
        result *= tl.load(scales + rn, mask=some_output, other=0.0)[:, None]
        result *= tl.load(row_scales + rm, mask=some_row, other=0.0)[None, :]
    if has_bias:
        result += tl.load(bias + rn, mask=some_output, other=0.0).to(tl.float32)[:, None]
    at = y + rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=some_row[None, :] & some_output[:, None])
