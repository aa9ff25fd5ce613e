"""Causal attention of prompts' tokens, bit for bit as if each were a decoding row.

Purpose: the Triton kernel for chunks of prompts where results must not depend on how a prompt is cut.
Does not know: models, the scheduler, how a launch is chosen.
Invariant: a token's sums are those that `paged_attention_kernel` (decode, fixed) and `join_splits_kernel`
take for the same token: keys in the same tiles and splits, by the same products, joined in the same order.
What tokens see of tiles and splits beyond their own adds exact zeros.

It holds if nothing is fused that is written as two operations, here and there: launches say so.

Letters: as in paged_attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.overlap import follow
from memory_efficient_gpt.triton_kernels.paged_attention import (
    LOG2E,
    NEVER,
    ONES,
    find_sequence,
    split_size,
    walk,
)


@triton.jit(do_not_specialize=["sequences", "table_stride", "window"])
def fixed_prompt_kernel(
    query, keys, values, key_scales, value_scales, block_tables, query_starts, context_lens, sinks, slopes,
    out, token_stride, head_stride, sequences, table_stride, scale, softcap, window,
    H: tl.constexpr, G: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, quantized: tl.constexpr, has_sinks: tl.constexpr, has_slopes: tl.constexpr,
    has_softcap: tl.constexpr, precision: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Grid (T // BQ + S, H): outputs of sequences with more than one query token; tensors as for
    paged_attention_kernel.

    Tokens of one tile may want splits of two sizes, where a longer context begins to need longer ones: then
    the tile is walked once for each size.
    """
    follow(early)
    BQ: tl.constexpr = BM // G
    place, head = tl.program_id(0), tl.program_id(1)
    sequence = find_sequence(query_starts, place, sequences, BQ)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    tile = place - (start // BQ + sequence)
    if (length > 1) & (tile * BQ < length):
        row = tl.arange(0, BM)
        token = tile * BQ + row // G
        query_head = head * G + row % G
        real = (row < BQ * G) & (token < length)
        position = context - length + token
        dk = tl.arange(0, PK)
        dv = tl.arange(0, PV)
        at = (start + token).to(tl.int64)
        q_at = query + at[:, None] * token_stride + query_head[:, None] * head_stride + dk[None, :]
        q = tl.load(q_at, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
        slope = tl.zeros([BM], tl.float32)
        if has_slopes:
            slope = tl.load(slopes + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        factor = scale if has_softcap else scale * LOG2E
        table = block_tables + sequence.to(tl.int64) * table_stride
        seen = context - length + tile * BQ + 1  # keys that the tile's first token sees
        last = tl.minimum(seen + BQ - 1, context)
        lowest = tl.maximum(seen - window, 0) if window > 0 else 0
        size = split_size(seen, LEAST, MOST)
        longest = split_size(last, LEAST, MOST)
        aligned: tl.constexpr = BS % TILE == 0 and LEAST % TILE == 0
        while size <= longest:
            m = tl.full([BM], NEVER, tl.float32)
            weight = tl.zeros([BM], tl.float32)
            total = tl.zeros([BM, PV], tl.float32)
            if has_sinks:
                m = tl.load(sinks + query_head, mask=real, other=NEVER).to(tl.float32) * LOG2E
                weight += 1.0
            for begin in range(lowest // size * size, last, size):
                first = tl.maximum(begin, lowest // TILE * TILE)
                end = tl.minimum(begin + size, last)
                whole = first if window > 0 else (
                    first + tl.maximum(tl.minimum(end, seen) - first, 0) // TILE * TILE
                )  # fmt: skip
                own = tl.full([BM], NEVER, tl.float32)
                own_weight = tl.zeros([BM, ONES], tl.float32)
                part = tl.zeros([BM, PV], tl.float32)
                own, own_weight, part, _ = walk(
                    own, own_weight, part, first, q, first, whole, end, position, slope, factor, softcap,
                    window, table, head, keys, values, key_scales, value_scales, dk, dv, H, BS, DK, DV, TILE,
                    aligned, quantized, has_slopes, has_softcap, False, precision, True, False,
                )  # fmt: skip
                own, own_weight, part, _ = walk(
                    own, own_weight, part, first, q, whole, end, end, position, slope, factor, softcap,
                    window, table, head, keys, values, key_scales, value_scales, dk, dv, H, BS, DK, DV, TILE,
                    aligned, quantized, has_slopes, has_softcap, True, precision, True, False,
                )  # fmt: skip
                higher = tl.maximum(m, own)
                before, now = tl.exp2(m - higher), tl.exp2(own - higher)
                weight = weight * before + tl.max(own_weight, axis=1) * now
                total = total * before[:, None] + part * now[:, None]
                m = higher
            fits = (size * MOST > position) & ((size == LEAST) | (size // 2 * MOST <= position))
            result = total / tl.maximum(weight, 1e-30)[:, None]
            o_at = out + (at * (H * G) + query_head)[:, None] * DV + dv[None, :]
            mask = (real & fits)[:, None] & (dv < DV)[None, :]
            tl.store(o_at, result.to(out.dtype.element_ty), mask=mask)
            size *= 2
