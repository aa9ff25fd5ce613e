"""x times a quantized weight transposed, for few rows: the weight is read once, as it is stored.

Purpose: the Triton kernel behind decoding and short prompts.
Does not know: which tile suits a shape (tiles.py), modules, workspaces' owners.
Invariant: the sum of an output is taken in an order that the tile alone decides, so a result never depends
on what ran before or on the order in which programs end.

A program multiplies a tile of outputs by a tile of rows over a part of the inputs. Weights are the left
operand: they go from shared memory to registers, are unpacked there and enter the tensor cores; scales are
applied to sums of a group, in float32. Where the inputs are split, each program leaves its sums in `partial`,
and the one that finds itself the last of its tile adds them in order: one launch, no second kernel.

Letters: M rows, N outputs, K inputs, P padded outputs; BN and BM a tile's outputs and rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from memory_efficient_gpt.triton_kernels.parameters import SPAN, load_scale, shift_of
from memory_efficient_gpt.triton_kernels.splitting import finish
from memory_efficient_gpt.triton_kernels.unpacking import unpack_slice


@triton.jit(do_not_specialize=["M", "spans", "spans_per_split"])
def quantized_matmul_kernel(
    x, codes, scales, offsets, bias, y, partial, counters,
    M, N, K, stride_x, P, spans, spans_per_split, unit,
    code: tl.constexpr, group: tl.constexpr, asymmetric: tl.constexpr, has_bias: tl.constexpr,
    even_k: tl.constexpr, early: tl.constexpr, splits: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y `[M, N]` = x `[M, K]` W^T + bias; W as packing.py has it. group 0: one scale an output.

    Grid (ceil(M / BM), P / BN, splits). For early see overlap.py, for partial and counters splitting.py.
    """
    half: tl.constexpr = x.dtype.element_ty == tl.float16
    slices: tl.constexpr = 4 if code == "int4" else 2
    width: tl.constexpr = SPAN // slices
    parts: tl.constexpr = SPAN // group if (group > 0 and group < SPAN) else 1
    per_part: tl.constexpr = slices // parts
    middle: tl.constexpr = 8 if code == "int4" else 128
    row_tile, output_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = output_tile * BN + tl.arange(0, BN)
    rm = row_tile * BM + tl.arange(0, BM)
    ri = tl.arange(0, width)
    some_row = rm[None, :] < M
    x_rows = x + rm[None, :] * stride_x
    total = tl.zeros([BN, BM], tl.float32)
    ones = tl.full([BN, width], 1.0, x.dtype.element_ty)
    sums = tl.zeros([BN, BM], tl.float32)
    first = split * spans_per_split
    last = tl.minimum(first + spans_per_split, spans) - 1
    if group > 0:
        s0 = load_scale(scales, first, last, 0, group, P, rn)
        if parts > 1:
            s1 = load_scale(scales, first, last, 1, group, P, rn)
        if parts > 2:
            s2 = load_scale(scales, first, last, 2, group, P, rn)
            s3 = load_scale(scales, first, last, 3, group, P, rn)
    if early:
        gdc_wait()
    for span in range(first, last + 1):
        words = tl.load(codes + (span.to(tl.int64) * P + rn)[:, None] * width + ri[None, :],
                        eviction_policy="evict_first")  # fmt: skip
        if group > 0:
            n0 = load_scale(scales, span + 1, last, 0, group, P, rn)
            if parts > 1:
                n1 = load_scale(scales, span + 1, last, 1, group, P, rn)
            if parts > 2:
                n2 = load_scale(scales, span + 1, last, 2, group, P, rn)
                n3 = load_scale(scales, span + 1, last, 3, group, P, rn)
        for part in tl.static_range(parts):
            if group > 0:
                inner = tl.zeros([BN, BM], tl.float32)
                inner_sums = tl.zeros([BN, BM], tl.float32)
            for piece in tl.static_range(per_part):
                k = span * SPAN + (part * per_part + piece) * width + ri[:, None]
                mask = some_row if even_k else some_row & (k < K)
                xs = tl.load(x_rows + k, mask=mask, other=0.0)
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
                total += inner * scale.to(tl.float32)[:, None]
                if asymmetric:
                    offset = load_scale(offsets, span, last, part, group, P, rn)
                    total -= inner_sums * shift_of(scale, offset, middle)[:, None]
        if group > 0:
            s0 = n0
            if parts > 1:
                s1 = n1
            if parts > 2:
                s2 = n2
                s3 = n3
    if early:
        gdc_launch_dependents()
    if group == 0:
        scale = tl.load(scales + rn)
        total *= scale.to(tl.float32)[:, None]
        if asymmetric:
            total -= sums * shift_of(scale, tl.load(offsets + rn), middle)[:, None]
    tile = output_tile * tl.num_programs(0) + row_tile
    finish(total * unit, bias, y, partial, counters, tile, split, rn, rm, M, N, has_bias, splits, BN, BM)
