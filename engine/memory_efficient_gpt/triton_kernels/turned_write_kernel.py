"""Rotary positions, after norms of heads, and the write to the paged cache in one pass.

Purpose: the Triton kernel that norms and turns queries and keys and stores keys and values.
Does not know: models, when these follow each other (native/deferral.py), how a launch is sized.
Invariant: what is written is what `rms_norm_kernel`, `rotary_kernel` and `write_kv_kernel` write one after
the other, but for the order of a head's sum of squares.

Letters: T tokens, H heads, D and DV elements of a key and of a value, P the elements of a key that turn, N
blocks of BS tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.layer_kernels import scaled, turned
from memory_efficient_gpt.triton_kernels.overlap import follow


@triton.jit
def _largest(x):
    """The largest magnitude of each row."""
    return tl.max(tl.abs(x.to(tl.float32)), axis=1)


@triton.jit
def _scale_of(magnitude, largest):
    """What the cache's number `largest` stands for in each row."""
    return tl.div_rn(magnitude, tl.zeros_like(magnitude) + largest)


@triton.jit
def _stored(x, scale, largest, pages, quantized: tl.constexpr, rounded: tl.constexpr):
    """Rows as the pages hold them; scale: one of each row."""
    if quantized:
        x = x.to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + tl.maximum(scale, 1.1754944e-38)[:, None])
        x = tl.minimum(tl.maximum(x, -largest), largest)
        if rounded:
            x = (x + 12582912.0) - 12582912.0  # to nearest, halves to even
    return x.to(pages.dtype.element_ty)


@triton.jit
def _part(
    source, offset: tl.constexpr, size: tl.constexpr, N: tl.constexpr, exists, factor, weight, kept,
    normed: tl.constexpr, style: tl.constexpr,
):  # fmt: skip
    """Elements offset .. offset + size of each head, N as a power of two; normed: times factor and weight.

    source and kept: the heads' addresses `[heads, 1]`. What is normed is also stored to kept.
    """
    at = tl.arange(0, N)
    mask = exists[:, None] & (at < size)[None, :]
    x = tl.load(source + offset + at[None, :], mask=mask, other=0.0)
    if normed:
        scale = tl.load(weight + offset + at, mask=at < size, other=0.0).to(tl.float32)[None, :]
        x = scaled(x.to(tl.float32), factor, scale, x.dtype, style)
        tl.store(kept + offset + at[None, :], x, mask=mask)
    return x


@triton.jit
def _turned_heads(
    x, head, heads, head_stride, weight, eps, kept, kept_stride, out, cos, sin, D: tl.constexpr,
    PD: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, normed: tl.constexpr,
    style: tl.constexpr,
):  # fmt: skip
    """Heads of one token from x to out `[heads, D]`, turned by cos and sin. Gives both halves and the rest.

    normed: after an RMS norm, whose results are stored to kept.
    """
    exists = head < heads
    source = x + head.to(tl.int64)[:, None] * head_stride
    kept += head.to(tl.int64)[:, None] * kept_stride
    factor = tl.zeros([1], tl.float32)
    if normed:
        d = tl.arange(0, PD)
        row = tl.load(source + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(row * row, axis=1) / D + eps)
    low = _part(source, 0, P // 2, HALF, exists, factor, weight, kept, normed, style)
    high = _part(source, P // 2, P // 2, HALF, exists, factor, weight, kept, normed, style)
    rest = _part(source, P, D - P, REST, exists, factor, weight, kept, normed, style)
    first, second = turned(low, high, cos, sin, P, HALF)
    _store(out + head[:, None] * D, exists, first, second, rest, D, P, HALF, REST)
    return first, second, rest


@triton.jit
def _store(
    rows, exists, first, second, rest, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """The parts of each head to its place; rows: addresses `[heads, 1]`."""
    at = tl.arange(0, HALF)
    mask = exists[:, None] & (at < P // 2)[None, :]
    tl.store(rows + at[None, :], first, mask=mask)
    tl.store(rows + P // 2 + at[None, :], second, mask=mask)
    if P < D:
        at = P + tl.arange(0, REST)
        tl.store(rows + at[None, :], rest, mask=exists[:, None] & (at < D)[None, :])


@triton.jit
def turned_write_kernel(
    query, key, value, cos, sin, query_weight, key_weight, query_kept, key_kept, query_out, key_out,
    key_pages, value_pages, key_scales, value_scales, slots, query_token_stride, query_head_stride,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, query_kept_token_stride,
    query_kept_head_stride, key_kept_token_stride, key_kept_head_stride, cos_stride, sin_stride, query_eps,
    key_eps, largest, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
    DV: tl.constexpr, PV: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr, quantized: tl.constexpr, rounded: tl.constexpr, normed: tl.constexpr,
    style: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Turn query and key into query_out `[T, HQ, D]` and key_out `[T, H, D]` by cos and sin `[T, P]`.

    The turned key and value `[T, H, DV]` are stored in pages `[N, BS, H, D]` at slots `[T]`. normed: RMS
    norms of the heads of query and key, with weights `[D]`, come first and are stored to query_kept and
    key_kept.

    Grid (T, ceil(HQ / BLOCK) + 2 * ceil(H / BLOCK)): a program has BLOCK heads of a token. HALF, REST, PD and
    PV: P / 2, D - P, D and DV as powers of two. quantized: scales `[N, BS, H]` get the largest magnitude by
    `largest`; rounded: to integers. early: launched while the kernel before still runs (overlap.py).
    """
    follow(early)
    query_blocks: tl.constexpr = (HQ + BLOCK - 1) // BLOCK
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    cos += token * cos_stride
    sin += token * sin_stride
    if block < query_blocks:
        _turned_heads(
            query + token * query_token_stride, block * BLOCK + lane, HQ, query_head_stride, query_weight,
            query_eps, query_kept + token * query_kept_token_stride, query_kept_head_stride,
            query_out + token * (HQ * D), cos, sin, D, PD, P, HALF, REST, normed, style,
        )  # fmt: skip
    elif block < query_blocks + blocks:
        head = (block - query_blocks) * BLOCK + lane
        first, second, rest = _turned_heads(
            key + token * key_token_stride, head, H, key_head_stride, key_weight, key_eps,
            key_kept + token * key_kept_token_stride, key_kept_head_stride, key_out + token * (H * D), cos,
            sin, D, PD, P, HALF, REST, normed, style,
        )  # fmt: skip
        row = tl.load(slots + token) * H + head
        scale = tl.zeros([1], tl.float32)
        if quantized:
            magnitude = tl.maximum(tl.maximum(_largest(first), _largest(second)), _largest(rest))
            scale = _scale_of(magnitude, largest)
            tl.store(key_scales + row, scale, mask=head < H)
        first = _stored(first, scale, largest, key_pages, quantized, rounded)
        second = _stored(second, scale, largest, key_pages, quantized, rounded)
        rest = _stored(rest, scale, largest, key_pages, quantized, rounded)
        _store(key_pages + row[:, None] * D, head < H, first, second, rest, D, P, HALF, REST)
    else:
        head = (block - query_blocks - blocks) * BLOCK + lane
        d = tl.arange(0, PV)
        mask = (head < H)[:, None] & (d < DV)[None, :]
        source = value + token * value_token_stride + head.to(tl.int64)[:, None] * value_head_stride
        x = tl.load(source + d[None, :], mask=mask, other=0.0)
        row = tl.load(slots + token) * H + head
        scale = tl.zeros([1], tl.float32)
        if quantized:
            scale = _scale_of(_largest(x), largest)
            tl.store(value_scales + row, scale, mask=head < H)
        x = _stored(x, scale, largest, value_pages, quantized, rounded)
        tl.store(value_pages + row[:, None] * DV + d[None, :], x, mask=mask)
