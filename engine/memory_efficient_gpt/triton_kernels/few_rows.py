"""x times a quantized weight transposed, for so few rows that only reading the weight counts.

Purpose: the Triton kernel behind decoding.
Does not know: which tile suits a shape (tiles.py), modules, workspaces' owners.
Invariant: as in matmul.py, the order of every sum is decided by the tile alone.

Each warp of a program multiplies the same outputs by the same rows over spans of its own: a batched product,
of which every warp computes one. So a program reads eight spans at once, its warps wait for each other once
a step, and most shapes need no second split over programs. What the warps have is added at the end.

Letters: M rows, N outputs, K inputs, P padded outputs; BN and BM a tile's outputs and rows; W warps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from memory_efficient_gpt.triton_kernels.overlap import begin
from memory_efficient_gpt.triton_kernels.parameters import SPAN, load_scale, shift_of
from memory_efficient_gpt.triton_kernels.splitting import finish
from memory_efficient_gpt.triton_kernels.unpacking import unpack_slice


@triton.jit(do_not_specialize=["M", "spans", "spans_per_split"])
def few_rows_kernel(
    x, codes, scales, offsets, bias, y, partial, counters,
    M, N, K, stride_x, P, spans, spans_per_split, unit,
    code: tl.constexpr, group: tl.constexpr, asymmetric: tl.constexpr, has_bias: tl.constexpr,
    even_k: tl.constexpr, early: tl.constexpr,
    splits: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """y `[M, N]` = x `[M, K]` W^T + bias; W as packing.py has it. group 0: one scale an output.

    early: on GPUs since Hopper, begin while the kernel before still runs.
    Grid (ceil(M / BM), P / BN, splits). For partial and counters see splitting.py.
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
    rw = tl.arange(0, W)
    some_row = (rm < M)[None, None, :]
    x_rows = x + rm[None, None, :] * stride_x
    total = tl.zeros([W, BN, BM], tl.float32)
    ones = tl.full([W, BN, width], 1.0, x.dtype.element_ty)
    sums = tl.zeros([W, BN, BM], tl.float32)
    first = split * spans_per_split
    last = tl.minimum(first + spans_per_split, spans) - 1
    outputs = rn[None, :]
    if group > 0:
        own = (first + rw)[:, None]
        s0 = load_scale(scales, own, last, 0, group, P, outputs)
        if parts > 1:
            s1 = load_scale(scales, own, last, 1, group, P, outputs)
        if parts > 2:
            s2 = load_scale(scales, own, last, 2, group, P, outputs)
            s3 = load_scale(scales, own, last, 3, group, P, outputs)
    if early:
        begin(codes, first, last, output_tile, P, width, BN, W)
    for start in range(first, last + 1, W):
        span = start + rw
        exists = (span <= last)[:, None, None]
        row = span.to(tl.int64)[:, None, None] * P + rn[None, :, None]
        place = codes + row * width + ri[None, None, :]
        words = tl.load(place, mask=exists, other=0, eviction_policy="evict_first")
        if group > 0:
            own = (span + W)[:, None]
            n0 = load_scale(scales, own, last, 0, group, P, outputs)
            if parts > 1:
                n1 = load_scale(scales, own, last, 1, group, P, outputs)
            if parts > 2:
                n2 = load_scale(scales, own, last, 2, group, P, outputs)
                n3 = load_scale(scales, own, last, 3, group, P, outputs)
        for part in tl.static_range(parts):
            if group > 0:
                inner = tl.zeros([W, BN, BM], tl.float32)
                inner_sums = tl.zeros([W, BN, BM], tl.float32)
            for piece in tl.static_range(per_part):
                k = span[:, None, None] * SPAN + (part * per_part + piece) * width + ri[None, :, None]
                mask = some_row & exists if even_k else some_row & exists & (k < K)
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
                total += inner * scale.to(tl.float32)[:, :, None]
                if asymmetric:
                    offset = load_scale(offsets, span[:, None], last, part, group, P, outputs)
                    total -= inner_sums * shift_of(scale, offset, middle)[:, :, None]
        if group > 0:
            s0 = n0
            if parts > 1:
                s1 = n1
            if parts > 2:
                s2 = n2
                s3 = n3
    if early:
        gdc_launch_dependents()
    if asymmetric and group == 0:
        shift = shift_of(tl.load(scales + rn), tl.load(offsets + rn), middle)
        result = tl.sum(total, axis=0) * tl.load(scales + rn).to(tl.float32)[:, None]
        result -= tl.sum(sums, axis=0) * shift[:, None]
    else:
        result = tl.sum(total, axis=0)
        if group == 0:
            result *= tl.load(scales + rn).to(tl.float32)[:, None]
    tile = output_tile * tl.num_programs(0) + row_tile
    finish(result * unit, bias, y, partial, counters, tile, split, rn, rm, M, N, has_bias, splits, BN, BM)
