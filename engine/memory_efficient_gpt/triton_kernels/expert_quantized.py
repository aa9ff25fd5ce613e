"""Rows times the quantized weight of the expert that each was sent to.

Purpose: the Triton kernel of routed experts' products on weights as packing.py lays them out.
Does not know: how rows were sorted (expert_routing.py), how a launch is sized (experts.py), modules.
Invariant: as in expert_kernels.py; scales are applied to sums of a group, in float32.

All experts' weights are one weight: output n of expert e is output e * N + n of it. For few rows each of W
warps multiplies spans of its own (as in few_rows.py), and their sums are added at the end: a program then
reads W spans at once. W = 1 for more rows: all warps share a span.

Letters: as in expert_kernels.py; P padded outputs of the whole weight, W spans at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.expert_kernels import outputs_of, write_tile
from memory_efficient_gpt.triton_kernels.expert_routing import tile_of
from memory_efficient_gpt.triton_kernels.overlap import follow
from memory_efficient_gpt.triton_kernels.parameters import SPAN, load_scale, shift_of
from memory_efficient_gpt.triton_kernels.unpacking import unpack_slice


@triton.jit
def scales_of(scales, span, last, group: tl.constexpr, P, outputs):
    """The scales of a span's groups, of which there may be up to four; fewer repeat the first ones'."""
    parts: tl.constexpr = 128 // group if group < 128 else 1
    s0 = load_scale(scales, span, last, 0, group, P, outputs)
    s1 = load_scale(scales, span, last, 1, group, P, outputs) if parts > 1 else s0
    s2 = load_scale(scales, span, last, 2, group, P, outputs) if parts > 2 else s0
    s3 = load_scale(scales, span, last, 3, group, P, outputs) if parts > 2 else s1
    return s0, s1, s2, s3


@triton.jit
def of_rows(values, W: tl.constexpr):
    """values `[BN]` or, of W spans, `[W, BN]`, as they multiply sums `[BN, BM]` or `[W, BN, BM]`."""
    return values[:, None] if W == 1 else values[:, :, None]


@triton.jit(do_not_specialize=["E", "k"])
def quantized_experts_kernel(
    x, codes, scales, offsets, bias, y, index, order, tile_experts, tile_starts, tile_ends, E, k, N, K, P,
    spans, unit, gated: tl.constexpr, interleaved: tl.constexpr, has_bias: tl.constexpr,
    activation: tl.constexpr, limit: tl.constexpr, alpha: tl.constexpr, direct: tl.constexpr,
    code: tl.constexpr, group: tl.constexpr, asymmetric: tl.constexpr, even_k: tl.constexpr,
    early: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """As `float_experts_kernel`; the weight as packing.py has it. group 0: one scale an output."""
    follow(early)
    half: tl.constexpr = x.dtype.element_ty == tl.float16
    slices: tl.constexpr = 4 if code == "int4" else 2
    width: tl.constexpr = SPAN // slices
    parts: tl.constexpr = SPAN // group if (group > 0 and group < SPAN) else 1
    per_part: tl.constexpr = slices // parts
    middle: tl.constexpr = 8 if code == "int4" else 128
    expert, place, pair, exists = tile_of(
        index, order, tile_experts, tile_starts, tile_ends, tl.program_id(0), E, direct, BM
    )
    if expert < 0:
        return
    output_tile = tl.program_id(1)
    outputs, outputs_exist = outputs_of(output_tile, N, gated, interleaved, False, BN)
    rn = expert * (2 * N if gated else N) + outputs
    source = pair // k if gated else place
    ri = tl.arange(0, width)
    if W == 1:
        some = exists[None, :]
        x_rows = x + source.to(tl.int64)[None, :] * K + ri[:, None]
        words_at = codes + rn.to(tl.int64)[:, None] * width + ri[None, :]
        columns = rn
        total = tl.zeros([BN, BM], tl.float32)
        ones = tl.full([BN, width], 1.0, x.dtype.element_ty)
    else:
        some = exists[None, None, :]
        x_rows = x + source.to(tl.int64)[None, None, :] * K + ri[None, :, None]
        words_at = codes + rn.to(tl.int64)[None, :, None] * width + ri[None, None, :]
        columns = rn[None, :]
        total = tl.zeros([W, BN, BM], tl.float32)
        ones = tl.full([W, BN, width], 1.0, x.dtype.element_ty)
    sums = tl.zeros_like(total)
    last = spans - 1
    own = tl.arange(0, W)[:, None] if W > 1 else 0
    if group > 0:
        s0, s1, s2, s3 = scales_of(scales, own, last, group, P, columns)
    for start in range(0, spans, W):
        if W == 1:
            span = start
            words = tl.load(words_at + span.to(tl.int64) * P * width)
            inside = some
            inputs = span * SPAN + ri[:, None]
        else:
            span = (start + tl.arange(0, W))[:, None, None]
            words = tl.load(words_at + span.to(tl.int64) * P * width, mask=span <= last, other=0)
            inside = some & (span <= last)
            inputs = span * SPAN + ri[None, :, None]
        if group > 0:
            n0, n1, n2, n3 = scales_of(scales, own + start + W, last, group, P, columns)
        for part in tl.static_range(parts):
            inner = tl.zeros_like(total)
            inner_sums = tl.zeros_like(total)
            for piece in tl.static_range(per_part):
                skipped = (part * per_part + piece) * width
                mask = inside if even_k else inside & (inputs + skipped < K)
                xs = tl.load(x_rows + span * SPAN + skipped, mask=mask, other=0.0)
                weights = unpack_slice(words, part * per_part + piece, code, half)
                if group > 0:
                    inner = tl.dot(weights, xs, inner)
                    if asymmetric:
                        inner_sums = tl.dot(ones, xs, inner_sums)
                else:
                    total = tl.dot(weights, xs, total)
                    if asymmetric:
                        sums = tl.dot(ones, xs, sums)
            if group > 0:
                scale = s0 if part == 0 else (s1 if part == 1 else (s2 if part == 2 else s3))
                total += inner * of_rows(scale.to(tl.float32), W)
                if asymmetric:
                    offset = load_scale(offsets, own + start, last, part, group, P, columns)
                    total -= inner_sums * of_rows(shift_of(scale, offset, middle), W)
        if group > 0:
            s0, s1, s2, s3 = n0, n1, n2, n3
    if W > 1:
        result = tl.sum(total, axis=0)
        result_sums = tl.sum(sums, axis=0)
    else:
        result = total
        result_sums = sums
    if group == 0:
        scale = tl.load(scales + rn)
        result = result * scale.to(tl.float32)[:, None]
        if asymmetric:
            result -= result_sums * shift_of(scale, tl.load(offsets + rn), middle)[:, None]
    target = place if gated else pair
    write_tile(result * unit, y, bias, expert, outputs, outputs_exist, output_tile, target, exists, N, gated,
               interleaved, has_bias, activation, limit, alpha, BN, BM)  # fmt: skip
