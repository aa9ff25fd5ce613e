"""The end of a product: bias, and the sum over programs that split the inputs.

Purpose: write a tile of results, or leave it for the last program of its tile to add up.
Does not know: how the tile was computed.
Invariant: sums are added in the order of the splits, whichever program ends last; counters are zero before
and after.

partial `[tiles, splits, BM, BN] float32`, counters `[tiles] int32`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    total, bias, y, partial, counters, tile, split, rn, rm, M, N,
    has_bias: tl.constexpr, splits: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store total `[BN, BM] float32`, outputs rn of rows rm, into y `[M, N]`."""
    some_row = rm[None, :] < M
    out = y + rm[None, :].to(tl.int64) * N + rn[:, None]
    out_mask = some_row & (rn[:, None] < N)
    if splits == 1:
        if has_bias:
            total += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out, total.to(y.dtype.element_ty), mask=out_mask)
    else:
        inside = tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
        mine = partial + tile.to(tl.int64) * (splits * BN * BM) + inside
        tl.store(mine + split * (BN * BM), total, mask=some_row)
        tl.debug_barrier()  # every thread's sums are written before the counter tells of them
        ended = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if ended == splits - 1:
            result = tl.zeros([BN, BM], tl.float32)
            for other in tl.static_range(splits):
                result += tl.load(mine + other * (BN * BM), mask=some_row, other=0.0, cache_modifier=".cg")
            if has_bias:
                result += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
            tl.store(out, result.to(y.dtype.element_ty), mask=out_mask)
            tl.store(counters + tile, 0)
