"""RMS norms, gated activations and rotary positions, each in one pass.

Purpose: the Triton kernels of the small layers between a model's products.
Does not know: models, modules, how a launch is sized (layers.py).
Invariant: a row's result depends on that row only; results are rounded where transformers' layers round them,
and everything else is float32.

early: a kernel was launched while the one before still runs (overlap.py).

Letters: D elements of a row, T tokens, P the elements of a head that turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.overlap import follow


@triton.jit
def scaled(values, factor, weight, dtype: tl.constexpr, style: tl.constexpr):
    """Rows of float32 times a factor of each row and the weight of each column, in dtype."""
    values *= factor[:, None]
    if style == "round_then_scale":
        values = values.to(dtype).to(tl.float32) * weight
    elif style == "one_plus_weight":
        values *= 1.0 + weight
    else:
        values *= weight
    return values.to(dtype)


@triton.jit(do_not_specialize=["rows", "inner"])
def rms_norm_kernel(
    x, other, total, weight, out, rows, inner, outer_stride, inner_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, style: tl.constexpr, adds: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """out `[rows, D]` = x over its root mean square, times weight `[D]`. Grid (ceil(rows / R),).

    Row r of x begins at r // inner * outer_stride + r % inner * inner_stride. BLOCK: D as a power of two.
    adds: x + other, rounded, is written to total and takes x's place; all three have x's rows.
    """
    follow(early)
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (at < D)[None, :]
    place = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    values = tl.load(x + place[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
    if adds:
        values += tl.load(other + place[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + place[:, None] + at[None, :], rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(values * values, axis=1) / D
    values = scaled(values, tl.rsqrt(mean + eps), scale, out.dtype.element_ty, style)
    target = out + row.to(tl.int64)[:, None] * D + at[None, :]
    tl.store(target, values, mask=mask)


@triton.jit
def activate(g, activation: tl.constexpr):
    """The activation of g, all float32."""
    if activation == "silu":
        y = g / (1.0 + tl.exp(-g))
    elif activation == "gelu_tanh":  # (1 + tanh(z)) / 2 is the logistic function of 2 z
        y = g / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (g + 0.044715 * g * g * g)))
    else:
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    return y


@triton.jit
def gated_kernel(
    gate, up, out, gate_stride, up_stride, D, BLOCK: tl.constexpr, activation: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """out `[rows, D]` = activation(gate) * up, rows strides apart. Grid (rows, ceil(D / BLOCK))."""
    follow(early)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < D
    g = tl.load(gate + row * gate_stride + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=mask, other=0.0).to(tl.float32)
    y = activate(g, activation).to(out.dtype.element_ty).to(tl.float32) * u
    tl.store(out + row * D + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def turned(low, high, cos, sin, P: tl.constexpr, HALF: tl.constexpr):
    """Both halves `[heads, HALF]` of P elements of each head of one token, turned by cos and sin `[P]`.

    Products and sums are rounded to the dtype.
    """
    dtype: tl.constexpr = low.dtype
    at = tl.arange(0, HALF)
    within = at < P // 2
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    cos_low = tl.load(cos + at, mask=within, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + P // 2 + at, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + at, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + P // 2 + at, mask=within, other=0.0).to(tl.float32)[None, :]
    first = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    second = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    return first.to(dtype), second.to(dtype)


@triton.jit
def turn(
    x, out, cos, sin, head, heads, head_stride,
    D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads of one token from x to out `[heads, D]`, turned by cos and sin `[P]`; the rest is copied."""
    exists = (head < heads)[:, None]
    source = x + head.to(tl.int64)[:, None] * head_stride
    target = out + head[:, None] * D
    at = tl.arange(0, HALF)
    mask = exists & (at < P // 2)[None, :]
    low = tl.load(source + at[None, :], mask=mask, other=0.0)
    high = tl.load(source + P // 2 + at[None, :], mask=mask, other=0.0)
    first, second = turned(low, high, cos, sin, P, HALF)
    tl.store(target + at[None, :], first, mask=mask)
    tl.store(target + P // 2 + at[None, :], second, mask=mask)
    if P < D:
        rest = P + tl.arange(0, REST)
        mask = exists & (rest < D)[None, :]
        kept = tl.load(source + rest[None, :], mask=mask, other=0.0)
        tl.store(target + rest[None, :], kept, mask=mask)


@triton.jit
def rotary_kernel(
    query, key, cos, sin, query_out, key_out, query_token_stride, query_head_stride, key_token_stride,
    key_head_stride, cos_stride, sin_stride, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Turn query and key into query_out `[T, HQ, D]` and key_out `[T, HK, D]` by cos and sin `[T, P]`.

    Grid (T, ceil(HQ / BLOCK) + ceil(HK / BLOCK)): a program turns BLOCK heads of a token. HALF and REST:
    P / 2 and D - P as powers of two.
    """
    follow(early)
    query_blocks: tl.constexpr = (HQ + BLOCK - 1) // BLOCK
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    cos += token * cos_stride
    sin += token * sin_stride
    if block < query_blocks:
        turn(query + token * query_token_stride, query_out + token * (HQ * D), cos, sin,
             block * BLOCK + lane, HQ, query_head_stride, D, P, HALF, REST)  # fmt: skip
    else:
        turn(key + token * key_token_stride, key_out + token * (HK * D), cos, sin,
             (block - query_blocks) * BLOCK + lane, HK, key_head_stride, D, P, HALF, REST)  # fmt: skip
