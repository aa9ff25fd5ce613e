"""Which rows an expert multiplies, and the weighted sum of what its experts give a token.

Purpose: the Triton kernels before and after the products of routed experts, and a tile's place among rows.
Does not know: weights, how a launch is sized (experts.py).
Invariant: every shape follows from the numbers of tokens, experts and choices; nothing is read by the host.
No order depends on which program ends first.

Letters: T tokens, k experts of a token, S = T * k pairs of both (pair p is token p // k), E experts, D hidden
size, BM rows of a tile. An index that is no expert's (E and up) stands for "none": it adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.overlap import follow


@triton.jit(do_not_specialize=["S", "slots"])
def route_kernel(
    index, order, tile_experts, tile_starts, tile_ends, S, slots,
    E: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Pairs in the order of their experts, and the tiles of BM of them that share one. Grid (E,).

    index `[S]`: each pair's expert. order `[S] int32`: pairs, by expert and then as they came; what is no
    expert's is left out. tile_experts, tile_starts, tile_ends `[slots] int32`: a tile's expert (-1: no tile),
    its first row in `order` and where its expert's rows end. BINS: a power of two above E.
    """
    follow(early)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, S, BLOCK):
        at = start + tl.arange(0, BLOCK)
        chosen = tl.load(index + at, mask=at < S, other=E).to(tl.int32)
        counts += tl.histogram(tl.minimum(chosen, E), BINS)
    tiles = (counts + BM - 1) // BM
    row = tl.sum(tl.where(bins < expert, counts, 0))
    end = row + tl.sum(tl.where(bins == expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, tiles, 0))
    last_tile = tile + tl.sum(tl.where(bins == expert, tiles, 0))
    some = tl.arange(0, 64)
    for first in range(tile, last_tile, 64):
        mine = first + some < last_tile
        tl.store(tile_experts + first + some, expert + some * 0, mask=mine)
        tl.store(tile_starts + first + some, row + (first + some - tile) * BM, mask=mine)
        tl.store(tile_ends + first + some, end + some * 0, mask=mine)
    if expert == E - 1:
        for first in range(last_tile, slots, 64):
            tl.store(tile_experts + first + some, some * 0 - 1, mask=first + some < slots)
    for start in range(0, S, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = tl.load(index + at, mask=at < S, other=E).to(tl.int32) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + row + rank - 1, at, mask=mine)
        row += tl.sum(mine.to(tl.int32))


@triton.jit
def tile_of(
    index, order, tile_experts, tile_starts, tile_ends, tile, E, direct: tl.constexpr, BM: tl.constexpr
):
    """A tile's expert (-1: none), the places `[BM]` of its rows among sorted ones, their pairs, which exist.

    direct: nothing is sorted, each pair is a tile.
    """
    rm = tl.arange(0, BM)
    if direct:
        expert = tl.load(index + tile).to(tl.int32)
        expert = tl.where(expert < E, expert, -1)
        place = tile + rm
        exists = rm < 1
        pair = place
    else:
        expert = tl.load(tile_experts + tile)
        start = tl.load(tile_starts + tile, mask=expert >= 0, other=0)
        end = tl.load(tile_ends + tile, mask=expert >= 0, other=0)
        place = start + rm
        exists = place < end
        pair = tl.load(order + place, mask=exists, other=0)
    return expert, place, pair, exists


@triton.jit(do_not_specialize=["E"])
def combine_kernel(
    rows, weights, index, out, D, E, k: tl.constexpr, BLOCK: tl.constexpr, early: tl.constexpr
):
    """out `[T, D]`: each token's sum of k rows of `rows` `[S, D]` times weights `[T, k]`, in their order.

    A product is rounded where torch's would be: if weights have the rows' dtype. The sum is float32.
    Grid (T, ceil(D / BLOCK)).
    """
    follow(early)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(k):
        pair = token * k + choice
        is_one = tl.load(index + pair) < E
        row = tl.load(rows + pair * D + at, mask=is_one & (at < D), other=0.0).to(tl.float32)
        product = row * tl.load(weights + pair).to(tl.float32)
        if weights.dtype.element_ty == rows.dtype.element_ty:
            product = product.to(rows.dtype.element_ty).to(tl.float32)
        total += tl.where(is_one, product, 0.0)
    tl.store(out + token * D + at, total.to(out.dtype.element_ty), mask=at < D)
