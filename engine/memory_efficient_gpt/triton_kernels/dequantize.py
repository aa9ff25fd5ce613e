"""A quantized weight, or some of its rows, as floats.

Purpose: the Triton kernel behind products with many rows and behind embeddings.
Does not know: what is done with the floats.
Invariant: each number is what `QuantizedWeight.dequantize` gives: computed in float32, rounded once.

Letters: T rows wanted, K inputs, P padded outputs; BN rows a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memory_efficient_gpt.triton_kernels.unpacking import unpack_slice

SPAN = tl.constexpr(128)


@triton.jit
def dequantize_kernel(
    codes, scales, offsets, rows, out, T, K, P, unit,
    code: tl.constexpr, group: tl.constexpr, asymmetric: tl.constexpr, selected: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out `[T, K]`: weights of outputs `rows` `[T] int64`, or of the first T. Grid (spans, ceil(T / BN))."""
    slices: tl.constexpr = 4 if code == "int4" else 2
    width: tl.constexpr = SPAN // slices
    parts: tl.constexpr = SPAN // group if (group > 0 and group < SPAN) else 1
    middle: tl.constexpr = 8 if code == "int4" else 128
    span = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = place < T
    outputs = tl.load(rows + place, mask=wanted, other=0) if selected else tl.where(wanted, place, 0)
    ri = tl.arange(0, width)
    words = tl.load(codes + (span.to(tl.int64) * P + outputs)[:, None] * width + ri[None, :])
    for j in tl.static_range(slices):
        # float16 holds every code and every fp8 number exactly, and has instructions on each GPU
        numbers = unpack_slice(words, j, code, True).to(tl.float32)
        at = outputs if group == 0 else (span * SPAN // group + j * parts // slices) * P + outputs
        scale = tl.load(scales + at).to(tl.float32)[:, None]
        if asymmetric:
            offset = tl.load(offsets + at).to(tl.float32)[:, None]
            numbers = (numbers + middle) * scale - offset
        else:
            numbers = numbers * scale
        k = span * SPAN + j * width + ri[None, :]
        tl.store(out + place[:, None] * K + k, (numbers * unit).to(out.dtype.element_ty),
                 mask=wanted[:, None] & (k < K))  # fmt: skip
