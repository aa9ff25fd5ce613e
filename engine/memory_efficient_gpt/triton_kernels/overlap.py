"""A kernel's beginning, while the kernel before it still runs (programmatic dependent launch, since Hopper).

Purpose: fetch weights, which no kernel writes, into the L2 cache before the inputs are ready.
Does not know: what is computed.
Invariant: nothing that another kernel may write is read, and nothing is written, before `begin` returns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The first lane of warp w fetches the pieces w, w + warps, ...: a bulk prefetch needs one thread.
_LANES = """{
    .reg .pred p, q;
    .reg .u32 t, w;
    .reg .u64 a;
    mov.u32 t, %tid.x;
    and.b32 w, t, 31;
    setp.eq.u32 q, w, 0;
    shr.u32 w, t, 5;
"""
_PIECE = """
    setp.lt.and.u32 p, w, $3, q;
    mad.wide.u32 a, w, $2, $1;
    @p cp.async.bulk.prefetch.L2.global [a], $4;
    add.u32 w, w, $5;
"""
_PREFETCH = tl.constexpr(_LANES + 4 * _PIECE + "    mov.u32 $0, 0;\n}")


@triton.jit
def begin(codes, first, last, tile, P, width: tl.constexpr, BN: tl.constexpr, warps: tl.constexpr):
    """Fetch this program's codes of spans first..last, let the next kernel start, wait for the one before.

    tile: the program's outputs are tile * BN and on. width: words of a span. At most four spans a warp are
    fetched.
    """
    start = codes + (first.to(tl.int64) * P + tile * BN) * width
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r,r,r,r",
        [start.to(tl.int64), P * (width * 2), last + 1 - first, BN * width * 2, warps],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
