"""Causal attention over a paged KV cache, for decoding rows and for chunks of prompts.

Purpose: the Triton kernels behind attention/triton.py: one body, two launches, and what joins split rows.
Does not know: models, the scheduler, how a launch is chosen.
Invariant: a token's output depends on its query and its visible keys only: keys are walked in tiles of fixed
size, a decoding row's in splits of fixed length, whatever else is in the step.

A program holds the queries of one KV head: of `BM // G` tokens, G query heads each. Softmax runs in base 2
and is online over tiles (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao and
others, "FlashAttention", 2022); splits are joined as in flash decoding.

Letters: T query tokens, S sequences, Hq and H query and KV heads, G = Hq / H, BS tokens of a block, D head
size, BQ query tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
"""A logit that counts nothing; -inf would make NaN of rows that see no key in a tile."""


@triton.jit
def _find_sequence(query_starts, place, sequences, BQ: tl.constexpr):
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


@triton.jit(do_not_specialize=["sequences", "table_stride", "window"])
def paged_attention_kernel(
    query, keys, values, key_scales, value_scales, block_tables, query_starts, context_lens, sinks, slopes,
    out, partial, sequences, table_stride, scale, softcap, window,
    H: tl.constexpr, G: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    quantized: tl.constexpr, has_sinks: tl.constexpr, has_slopes: tl.constexpr, has_softcap: tl.constexpr,
    decode: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """decode: grid (S, H, splits), sequences with one query token, into partial; else (T // BQ + S, H, 1) and
    those with more, into out.

    query `[T, Hq, DK]`, keys `[N, BS, H, DK]`, values `[N, BS, H, DV]`, scales `[N, BS, H] float32`,
    block_tables `[S, table_stride] int32`, query_starts `[S + 1] int32`, context_lens `[S] int32`, out
    `[T, Hq, DV]`.
    partial `[S, H, splits, G, DV + 2] float32`: sums, then their weight, then the largest logit (base 2).
    PK, PV: DK and DV as powers of two. window 0: none.
    """
    BQ: tl.constexpr = 1 if decode else BM // G
    head = tl.program_id(1)
    split = tl.program_id(2)
    place = tl.program_id(0)
    sequence = place if decode else _find_sequence(query_starts, place, sequences, BQ)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    tile = 0 if decode else place - (start // BQ + sequence)
    wanted = (length == 1) if decode else ((length > 1) & (tile * BQ < length))
    if wanted:
        row = tl.arange(0, BM)
        token = tile * BQ + row // G
        query_head = head * G + row % G
        real = (row < BQ * G) & (token < length)
        position = context - length + token
        dk = tl.arange(0, PK)
        dv = tl.arange(0, PV)
        q_at = query + ((start + token).to(tl.int64) * (H * G) + query_head)[:, None] * DK + dk[None, :]
        q = tl.load(q_at, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
        highest = tl.minimum(context - length + (tile + 1) * BQ, context)
        lowest = tl.maximum(context - length + tile * BQ - window + 1, 0) if window > 0 else 0
        first, last = lowest // TILE * TILE, highest
        if decode:
            first = tl.maximum(first, split * SPLIT)
            last = tl.minimum(last, (split + 1) * SPLIT)
        m = tl.full([BM], NEVER, tl.float32)
        weight = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, PV], tl.float32)
        if has_slopes:
            slope = tl.load(slopes + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        for at in range(first, last, TILE):
            key_position = at + tl.arange(0, TILE)
            exists = key_position < last
            block = tl.load(block_tables + sequence.to(tl.int64) * table_stride + key_position // BS,
                            mask=exists, other=0)  # fmt: skip
            slot = (block.to(tl.int64) * BS + key_position % BS) * H + head
            k = tl.load(
                keys + slot[None, :] * DK + dk[:, None], mask=exists[None, :] & (dk < DK)[:, None], other=0.0
            )
            logits = tl.dot(q, k.to(q.dtype), input_precision=precision) * scale
            if quantized:
                logits *= tl.load(key_scales + slot, mask=exists, other=0.0)[None, :]
            if has_softcap:
                bent = 2.0 / (1.0 + tl.exp2(-2.0 * LOG2E * logits / softcap)) - 1.0
                logits = softcap * bent
            logits *= LOG2E
            distance = key_position[None, :] - position[:, None]
            if has_slopes:
                logits += slope[:, None] * distance
            visible = (distance <= 0) & exists[None, :]
            if window > 0:
                visible &= distance > -window
            logits = tl.where(visible, logits, NEVER)
            higher = tl.maximum(m, tl.max(logits, axis=1))
            shares = tl.where(visible, tl.exp2(logits - higher[:, None]), 0.0)
            shrink = tl.exp2(m - higher)
            weight = weight * shrink + tl.sum(shares, axis=1)
            v = tl.load(
                values + slot[:, None] * DV + dv[None, :],
                mask=exists[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
            if quantized:
                shares *= tl.load(value_scales + slot, mask=exists, other=0.0)[None, :]
            total = tl.dot(
                shares.to(q.dtype), v.to(q.dtype), total * shrink[:, None], input_precision=precision
            )
            m = higher
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


@triton.jit(do_not_specialize=["splits", "window"])
def join_splits_kernel(
    partial, query_starts, context_lens, sinks, out, splits, window,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr, SPLIT: tl.constexpr,
    has_sinks: tl.constexpr,
):  # fmt: skip
    """Grid (S, H * G): the outputs of sequences with one query token, from what their splits left."""
    sequence, query_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - start == 1:
        context = tl.load(context_lens + sequence)
        first = (tl.maximum(context - window, 0) if window > 0 else 0) // SPLIT
        dv = tl.arange(0, PV)
        m = tl.full([1], NEVER, tl.float32)
        weight = tl.zeros([1], tl.float32)
        total = tl.zeros([PV], tl.float32)
        if has_sinks:
            m = tl.zeros([1], tl.float32) + tl.load(sinks + query_head).to(tl.float32) * LOG2E
            weight += 1.0
        for split in range(first, tl.minimum(splits, (context + SPLIT - 1) // SPLIT)):
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
def write_kv_kernel(
    source, pages, scales, slots, token_stride, head_stride, largest,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, quantized: tl.constexpr, rounded: tl.constexpr,
):  # fmt: skip
    """Grid (T, H): source `[T, H, D]`, rows contiguous, into pages `[N, BS, H, D]` at slots `[T]`.

    quantized: scales `[N, BS, H]` get the largest magnitude by `largest`; rounded: to integers.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, P)
    slot = tl.load(slots + token) * H + head
    numbers = tl.load(source + token * token_stride + head * head_stride + d, mask=d < D, other=0.0)
    if quantized:
        numbers = numbers.to(tl.float32)
        scale = tl.max(tl.abs(numbers)) / largest
        numbers = tl.minimum(tl.maximum(numbers / tl.maximum(scale, 1.1754944e-38), -largest), largest)
        if rounded:
            numbers = (numbers + 12582912.0) - 12582912.0  # to nearest, halves to even
        tl.store(scales + slot, scale)
    tl.store(pages + slot * D + d, numbers.to(pages.dtype.element_ty), mask=d < D)
