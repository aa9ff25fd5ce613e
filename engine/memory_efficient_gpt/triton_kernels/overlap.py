"""A kernel's beginning, while the kernel before it still runs (programmatic dependent launch, since Hopper).

Purpose: wait for the kernel before; fetch weights, which no kernel writes, into the L2 cache meanwhile.
Does not know: what is computed.
Invariant: nothing that another kernel of a layer may write is read, and nothing is written, before `follow`,
`begin` or `wait` returns. What a step's layers only read (where sequences begin, how long they are, where
their blocks are) is there before the step's first kernel of ours starts: a kernel that does not begin early,
such as torch's look-up of embeddings, comes between.

A kernel lets the next one start by `gdc_launch_dependents`: small ones at once; those that keep the memory
busy at their end only, since programs that start among theirs would be spread unevenly.
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
def let_next_begin(early: tl.constexpr):
    """The next kernel may start. early: this one was launched while the one before still runs."""
    if early:
        gdc_launch_dependents()


@triton.jit
def wait(early: tl.constexpr):
    """For the kernel before, and so for what it wrote."""
    if early:
        gdc_wait()


@triton.jit
def follow(early: tl.constexpr):
    """Let the next kernel start, then wait for the one before. early: it was launched so."""
    if early:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(start, stride, pieces, size, warps: tl.constexpr):
    """Fetch `pieces` times `size` bytes from the pointer `start`, `stride` bytes apart; at most four a warp.

    All are multiples of 16 bytes.
    """
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r,r,r,r", [start.to(tl.int64), stride, pieces, size, warps],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def begin(codes, first, last, tile, P, width: tl.constexpr, BN: tl.constexpr, warps: tl.constexpr):
    """Fetch each warp's first span of this program's codes, from first..last; wait for the kernel before.

    tile: the program's outputs are tile * BN and on. width: words of a span.
    """
    start = codes + (first.to(tl.int64) * P + tile * BN) * width
    prefetch(start, P * (width * 2), tl.minimum(last + 1 - first, warps), BN * width * 2, warps)
    gdc_wait()
