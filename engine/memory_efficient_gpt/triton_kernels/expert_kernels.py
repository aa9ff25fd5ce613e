"""Rows times the weight of the expert that each was sent to, for float weights.

Purpose: the Triton kernel of routed experts' products, and what such kernels do with a tile of sums.
Does not know: how rows were sorted (expert_routing.py), how a launch is sized (experts.py), modules.
Invariant: the order of a row's sums is decided by the sizes of its tile alone, whatever rows are beside it.

A program multiplies a tile of one expert's outputs by a tile of its rows. Weights are the left operand, so
that few rows make a narrow product instead of a padded one. Where a gate and its product partner are wanted,
one half of a tile's outputs are gates and the other half their partners: activation and product happen before
anything is written.

Letters: E experts, N results of a row, K inputs, k experts of a token; BN, BM, BK outputs, rows and inputs of
a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.expert_routing import tile_of
from memory_efficient_gpt.triton_kernels.layer_kernels import activate
from memory_efficient_gpt.triton_kernels.overlap import follow


@triton.jit
def outputs_of(
    tile, N, gated: tl.constexpr, interleaved: tl.constexpr, masked: tl.constexpr, BN: tl.constexpr
):
    """The outputs `[BN]` of an expert's weight that a tile multiplies, and which of them exist.

    gated: BN / 2 gates and their partners: all gates come first in the weight, or (interleaved) each is
    followed by its partner. Unless masked, the last output stands for those that don't exist: so loads along
    inputs need no mask; loads along outputs would be single ones if their addresses were clamped.
    """
    rn = tl.arange(0, BN)
    if gated and not interleaved:
        half: tl.constexpr = BN // 2
        outputs = tile * half + rn % half
        exists = outputs < N
        if not masked:
            outputs = tl.minimum(outputs, N - 1)
        outputs += (rn // half) * N
    else:
        outputs = tile * BN + rn
        count = 2 * N if gated else N
        exists = outputs < count
        if not masked:
            outputs = tl.minimum(outputs, count - 1)
    return outputs, exists


@triton.jit
def gate(g, u, dtype: tl.constexpr, activation: tl.constexpr, limit: tl.constexpr, alpha: tl.constexpr):
    """The gated product of g and u, float32, rounded to dtype where transformers' layers round.

    limit: where above 0, g and u are limited first. activation "sigmoid": g * sigmoid(alpha * g) * (u + 1).
    """
    g = g.to(dtype).to(tl.float32)
    u = u.to(dtype).to(tl.float32)
    if limit > 0:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
    if activation == "sigmoid":
        share = 1.0 / (1.0 + tl.exp(-(g * alpha).to(dtype).to(tl.float32)))
        g = (g * share.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        u = (u + 1.0).to(dtype).to(tl.float32)
    else:
        g = activate(g, activation).to(dtype).to(tl.float32)
    return g * u


@triton.jit
def write_tile(
    total, y, bias, expert, outputs, outputs_exist, tile, rows, exists, N,
    gated: tl.constexpr, interleaved: tl.constexpr, has_bias: tl.constexpr, activation: tl.constexpr,
    limit: tl.constexpr, alpha: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store total `[BN, BM] float32`, plus bias `[E, N or 2 N]`, into rows of y `[S, N]`."""
    dtype: tl.constexpr = y.dtype.element_ty
    if has_bias:
        total = total.to(dtype).to(tl.float32)
        width = 2 * N if gated else N
        added = tl.load(bias + expert * width + outputs, mask=outputs_exist, other=0.0)
        total += added.to(tl.float32)[:, None]
    if gated:
        half: tl.constexpr = BN // 2
        if interleaved:
            pairs = total.reshape(half, 2, BM).permute(0, 2, 1)
        else:
            pairs = total.reshape(2, half, BM).permute(1, 2, 0)
        g, u = tl.split(pairs)
        result = gate(g, u, dtype, activation, limit, alpha)
        at = tile * half + tl.arange(0, half)
    else:
        result = total
        at = tile * BN + tl.arange(0, BN)
    place = y + rows.to(tl.int64)[None, :] * N + at[:, None]
    tl.store(place, result.to(dtype), mask=exists[None, :] & (at < N)[:, None])


@triton.jit(do_not_specialize=["E", "k"])
def float_experts_kernel(
    x, w, bias, y, index, order, tile_experts, tile_starts, tile_ends, E, k, N, K, stride_e, stride_n,
    stride_k,
    transposed: tl.constexpr, gated: tl.constexpr, interleaved: tl.constexpr, has_bias: tl.constexpr,
    activation: tl.constexpr, limit: tl.constexpr, alpha: tl.constexpr, direct: tl.constexpr,
    even_k: tl.constexpr, early: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of x times their experts' weights w `[E, N or 2 N, K]`, of any strides.

    transposed: its outputs are adjacent, not its inputs.
    gated: x `[T, K]` are tokens, y `[S, N]` gated products in the order of sorted rows. Otherwise x `[S, K]`
    has that order, y `[S, N]` that of pairs. Grid (tiles, ceil(weights' outputs / BN)).
    """
    follow(early)
    precision: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    expert, place, pair, exists = tile_of(
        index, order, tile_experts, tile_starts, tile_ends, tl.program_id(0), E, direct, BM
    )
    if expert < 0:
        return
    output_tile = tl.program_id(1)
    outputs, outputs_exist = outputs_of(output_tile, N, gated, interleaved, transposed, BN)
    rk = tl.arange(0, BK)
    weights = w + expert.to(tl.int64) * stride_e
    weights += outputs.to(tl.int64)[:, None] * stride_n + rk[None, :] * stride_k
    source = pair // k if gated else place
    inputs = x + source.to(tl.int64)[None, :] * K + rk[:, None]
    total = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        inside = start + rk < K
        if transposed:
            mask = outputs_exist[:, None] if even_k else outputs_exist[:, None] & inside[None, :]
            ws = tl.load(weights, mask=mask, other=0.0)
        elif even_k:
            ws = tl.load(weights)
        else:
            ws = tl.load(weights, mask=inside[None, :], other=0.0)
        mask = exists[None, :] if even_k else exists[None, :] & inside[:, None]
        xs = tl.load(inputs, mask=mask, other=0.0)
        total = tl.dot(ws, xs, total, input_precision=precision)
        weights += BK * stride_k
        inputs += BK
    target = place if gated else pair
    write_tile(total, y, bias, expert, outputs, outputs_exist, output_tile, target, exists, N, gated,
               interleaved, has_bias, activation, limit, alpha, BN, BM)  # fmt: skip
