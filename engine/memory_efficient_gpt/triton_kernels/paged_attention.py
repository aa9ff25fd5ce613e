"""Causal attention over a paged KV cache, for decoding rows and for chunks of prompts.

Purpose: the Triton kernels behind attention/triton.py: one body, two launches, and what joins split rows.
Does not know: models, the scheduler, how a launch is chosen.
Invariant: a token's output depends on its query and its visible keys only, but for the order of sums: keys
are walked in tiles of fixed size, a decoding row's in splits whose length follows from its own context and
from the shortest that the launch asks for.

A program holds the queries of one KV head: of `BM // G` tokens, G query heads each. Softmax runs in base 2
and is online over tiles (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao and
others, "FlashAttention", 2022); splits are joined as in flash decoding.

Letters: T query tokens, S sequences, Hq and H query and KV heads, G = Hq / H, BS tokens of a block, D head
size, BQ query tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.overlap import follow, let_next_begin, wait

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
"""A logit that counts nothing; -inf would make NaN of rows that see no key in a tile."""
ONES = tl.constexpr(16)
"""Columns of ones: the fewest that tensor cores take in any dtype."""


@triton.jit
def find_sequence(query_starts, place, sequences, BQ: tl.constexpr):
    """The sequence whose tile is number `place`, where those of sequence s begin at start // BQ + s."""
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        first = tl.load(query_starts + middle) // BQ + middle
        if first <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def split_size(context, least, MOST: tl.constexpr):
    """Keys of one split of a row with so many: `least` times a power of two, for at most MOST splits."""
    size = least
    while size * MOST < context:
        size *= 2
    return size


@triton.jit
def walk(
    m, weight, total, block, q, first, last, end, position, slope, factor, softcap, window, table, head, keys,
    values, key_scales, value_scales, dk, dv,
    H: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, aligned: tl.constexpr, quantized: tl.constexpr, has_slopes: tl.constexpr,
    has_softcap: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr, fixed: tl.constexpr,
    ahead: tl.constexpr,
):  # fmt: skip
    """One online softmax step for each tile of keys in first .. last; masked: not every query sees all.

    aligned: a tile lies within one block. fixed: shares are summed by tensor cores, in an order that does not
    follow from the shape of the tile; weight is then `[BM, ONES]`, alike in each column. ahead: the number of
    a tile's block is loaded one tile earlier. block: then the first tile's, where aligned; given back for the
    tile after the last one, if that is before `end`.
    """
    ones = tl.full([TILE, ONES], 1.0, tl.float32).to(q.dtype)
    for at in range(first, last, TILE):
        key_position = at + tl.arange(0, TILE)
        exists = key_position < last
        if aligned and ahead:  # keys wait for the number of their block
            own = block.to(tl.int64)
            block = tl.load(table + tl.minimum(at + TILE, end - 1) // BS)
        elif aligned:
            own = tl.load(table + at // BS).to(tl.int64)
        elif masked:
            own = tl.load(table + key_position // BS, mask=exists, other=0).to(tl.int64)
        else:
            own = tl.load(table + key_position // BS).to(tl.int64)
        slot = (own * BS + key_position % BS) * H + head
        k_at = keys + slot[None, :] * DK + dk[:, None]
        v_at = values + slot[:, None] * DV + dv[None, :]
        if masked:
            k = tl.load(k_at, mask=exists[None, :] & (dk < DK)[:, None], other=0.0)
        else:
            k = tl.load(k_at, mask=(dk < DK)[:, None], other=0.0)
        logits = tl.dot(q, k.to(q.dtype), input_precision=precision)
        if quantized:
            logits *= tl.load(key_scales + slot, mask=exists, other=0.0)[None, :]
        logits *= factor
        if has_softcap:
            bent = 2.0 / (1.0 + tl.exp2(-2.0 * LOG2E * logits / softcap)) - 1.0
            logits = softcap * LOG2E * bent
        distance = key_position[None, :] - position[:, None]
        if has_slopes:
            logits += slope[:, None] * distance
        if masked:
            visible = (distance <= 0) & exists[None, :]
            if window > 0:
                visible &= distance > -window
            logits = tl.where(visible, logits, NEVER)
        higher = tl.maximum(m, tl.max(logits, axis=1))
        shares = tl.exp2(logits - higher[:, None])
        if masked:
            shares = tl.where(visible, shares, 0.0)
        shrink = tl.exp2(m - higher)
        if fixed:
            weight = tl.dot(shares.to(q.dtype), ones, weight * shrink[:, None], input_precision=precision)
        else:
            weight = weight * shrink + tl.sum(shares, axis=1)
        if masked:
            v = tl.load(v_at, mask=exists[:, None] & (dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
        if quantized:
            shares *= tl.load(value_scales + slot, mask=exists, other=0.0)[None, :]
        total = tl.dot(shares.to(q.dtype), v.to(q.dtype), total * shrink[:, None], input_precision=precision)
        m = higher
    return m, weight, total, block


@triton.jit
def _keys_of(
    context, length, offset, window, split, least, BQ: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
    decode: tl.constexpr,
):  # fmt: skip
    """The first key (of a whole tile) that a program sees, and the end; offset: of its first query."""
    lowest = tl.maximum(context - length + offset - window + 1, 0) if window > 0 else 0
    first = lowest // TILE * TILE
    last = tl.minimum(context - length + offset + BQ, context)
    if decode:
        size = split_size(context, least, MOST)
        first = tl.maximum(first, split * size)
        last = tl.minimum(last, (split + 1) * size)
    return first, last


@triton.jit(do_not_specialize=["sequences", "table_stride", "window", "least"])
def paged_attention_kernel(
    query, keys, values, key_scales, value_scales, block_tables, query_starts, context_lens, sinks, slopes,
    out, partial, token_stride, head_stride, sequences, table_stride, scale, softcap, window,
    least, H: tl.constexpr, G: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
    quantized: tl.constexpr, has_sinks: tl.constexpr, has_slopes: tl.constexpr,
    has_softcap: tl.constexpr, decode: tl.constexpr, precision: tl.constexpr, fixed: tl.constexpr,
    early: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """decode: grid (H, S, splits), sequences with one query token, into partial; else (T // BQ + S, H, 1) and
    those with more, into out. So heads of a sequence are read together when decoding: a token's keys of all
    heads are adjacent.

    query `[T, Hq, DK]` with any strides but the last, keys `[N, BS, H, DK]`, values `[N, BS, H, DV]`, scales
    `[N, BS, H] float32`, block_tables `[S, table_stride] int32`, query_starts `[S + 1] int32`, context_lens
    `[S] int32`, out `[T, Hq, DV]`.
    partial `[S, H, splits, G, DV + 2] float32`: sums, then their weight, then the largest logit (base 2).
    least: keys of the shortest split, a multiple of TILE. PK, PV: DK and DV as powers of two. window 0: none.
    fixed: see walk. ahead: what no layer writes is read
    before the kernel before has ended, too.
    """
    if ahead:
        let_next_begin(early)
    else:
        follow(early)
    BQ: tl.constexpr = 1 if decode else BM // G
    head = tl.program_id(0 if decode else 1)
    place = tl.program_id(1 if decode else 0)
    split = tl.program_id(2)
    sequence = place if decode else find_sequence(query_starts, place, sequences, BQ)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    tile = 0 if decode else place - (start // BQ + sequence)
    if ahead:
        table = block_tables + sequence.to(tl.int64) * table_stride
        first, last = _keys_of(context, length, tile * BQ, window, split, least, BQ, TILE, MOST, decode)
        block = tl.load(table + tl.maximum(tl.minimum(first, last - 1), 0) // BS)
        wait(early)  # every program waits, or the next kernel would not
    if (length == 1) if decode else ((length > 1) & (tile * BQ < length)):
        row = tl.arange(0, BM)
        token = tile * BQ + row // G
        query_head = head * G + row % G
        real = (row < BQ * G) & (token < length)
        position = context - length + token
        dk = tl.arange(0, PK)
        dv = tl.arange(0, PV)
        q_at = (
            query + (start + token).to(tl.int64)[:, None] * token_stride + query_head[:, None] * head_stride
        )
        q = tl.load(q_at + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0)
        if not ahead:
            first, last = _keys_of(context, length, tile * BQ, window, split, least, BQ, TILE, MOST, decode)
            block = first
        # whole tiles that every query of this program sees need no mask
        seen = tl.minimum(last, context - length + tile * BQ + 1)
        whole = first if window > 0 else first + tl.maximum(seen - first, 0) // TILE * TILE
        m = tl.full([BM], NEVER, tl.float32)
        weight = tl.zeros([BM, ONES] if fixed else [BM], tl.float32)
        total = tl.zeros([BM, PV], tl.float32)
        slope = tl.zeros([BM], tl.float32)
        if has_slopes:
            slope = tl.load(slopes + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        factor = scale if has_softcap else scale * LOG2E
        if not ahead:
            table = block_tables + sequence.to(tl.int64) * table_stride
        aligned: tl.constexpr = BS % TILE == 0
        m, weight, total, block = walk(
            m, weight, total, block, q, first, whole, last, position, slope, factor, softcap, window, table,
            head, keys, values, key_scales, value_scales, dk, dv, H, BS, DK, DV, TILE, aligned, quantized,
            has_slopes, has_softcap, False, precision, fixed, ahead,
        )  # fmt: skip
        m, weight, total, block = walk(
            m, weight, total, block, q, whole, last, last, position, slope, factor, softcap, window, table,
            head, keys, values, key_scales, value_scales, dk, dv, H, BS, DK, DV, TILE, aligned, quantized,
            has_slopes, has_softcap, True, precision, fixed, ahead,
        )  # fmt: skip
        if fixed:
            weight = tl.max(weight, axis=1)
        if decode:
            base = (((sequence * H + head) * tl.num_programs(2) + split) * G + row).to(tl.int64) * (DV + 2)
            tl.store(partial + base[:, None] + dv[None, :], total, mask=real[:, None] & (dv < DV)[None, :])
            tl.store(partial + base + DV, weight, mask=real)
            tl.store(partial + base + DV + 1, m, mask=real)
        else:
            if has_sinks:
                sink = tl.load(sinks + query_head, mask=real, other=NEVER).to(tl.float32) * LOG2E
                higher = tl.maximum(m, sink)
                shrink = tl.exp2(m - higher)
                weight = weight * shrink + tl.exp2(sink - higher)
                total *= shrink[:, None]
            result = total / tl.maximum(weight, 1e-30)[:, None]
            o_at = out + ((start + token).to(tl.int64) * (H * G) + query_head)[:, None] * DV + dv[None, :]
            tl.store(o_at, result.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["splits", "window", "least"])
def join_splits_kernel(
    partial, query_starts, context_lens, sinks, out, splits, window, least,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr, MOST: tl.constexpr,
    has_sinks: tl.constexpr, early: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """Grid (S, H * G): the outputs of sequences with one query token, from what their splits left."""
    if ahead:
        let_next_begin(early)
    else:
        follow(early)
    sequence, query_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    if ahead:
        wait(early)
    if length == 1:
        size = split_size(context, least, MOST)
        first = (tl.maximum(context - window, 0) if window > 0 else 0) // size
        dv = tl.arange(0, PV)
        m = tl.full([1], NEVER, tl.float32)
        weight = tl.zeros([1], tl.float32)
        total = tl.zeros([PV], tl.float32)
        if has_sinks:
            m = tl.zeros([1], tl.float32) + tl.load(sinks + query_head).to(tl.float32) * LOG2E
            weight += 1.0
        for split in range(first, tl.minimum(splits, (context + size - 1) // size)):
            row = ((sequence * H + query_head // G) * splits + split) * G + query_head % G
            base = partial + row.to(tl.int64) * (DV + 2)
            part = tl.load(base + dv, mask=dv < DV, other=0.0)
            own = tl.load(base + DV + 1)
            higher = tl.maximum(m, own)
            weight = weight * tl.exp2(m - higher) + tl.load(base + DV) * tl.exp2(own - higher)
            total = total * tl.exp2(m - higher) + part * tl.exp2(own - higher)
            m = higher
        result = total / tl.maximum(weight, 1e-30)
        at = out + (start.to(tl.int64) * (H * G) + query_head) * DV + dv
        tl.store(at, result.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit
def _store_row(
    row, at, scale_at, largest, d, D: tl.constexpr, quantized: tl.constexpr, rounded: tl.constexpr
):
    """One head's numbers to a page; quantized: with the scale that makes the largest magnitude `largest`."""
    if quantized:
        row = row.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(row)), largest)
        row = tl.div_rn(row, tl.zeros_like(row) + tl.maximum(scale, 1.1754944e-38))
        row = tl.minimum(tl.maximum(row, -largest), largest)
        if rounded:
            row = (row + 12582912.0) - 12582912.0  # to nearest, halves to even
        tl.store(scale_at, scale)
    tl.store(at + d, row.to(at.dtype.element_ty), mask=d < D)


@triton.jit
def write_kv_kernel(
    key, value, key_pages, value_pages, key_scales, value_scales, slots, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, largest, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, quantized: tl.constexpr, rounded: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Grid (T, H): key `[T, H, DK]` and value `[T, H, DV]`, rows contiguous, into pages `[N, BS, H, D]` at
    slots `[T]`.

    quantized: scales `[N, BS, H]` get the largest magnitude by `largest`; rounded: to integers.
    """
    follow(early)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token) * H + head
    d = tl.arange(0, PK)
    row = tl.load(key + token * key_token_stride + head * key_head_stride + d, mask=d < DK, other=0.0)
    _store_row(row, key_pages + slot * DK, key_scales + slot, largest, d, DK, quantized, rounded)
    d = tl.arange(0, PV)
    row = tl.load(value + token * value_token_stride + head * value_head_stride + d, mask=d < DV, other=0.0)
    _store_row(row, value_pages + slot * DV, value_scales + slot, largest, d, DV, quantized, rounded)
