"""Scales and offsets of a span, loaded one span ahead of their use.

Purpose: what both matmul kernels do with a group's scale and offset.
Does not know: codes, tiles, rows.
Invariant: symmetric codes have had their middle subtracted, so their offset is zero; asymmetric ones are
corrected by what the middle's subtraction took away.

Letters: P padded outputs; a span has up to four groups, its parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = tl.constexpr(128)


@triton.jit
def load_scale(scales, span, last, part: tl.constexpr, group: tl.constexpr, P, outputs):
    """Scales of a part of `span` (of `last` where that is less), float16, shaped as span and outputs are."""
    at = (tl.minimum(span, last) * SPAN // group + part) * P + outputs
    return tl.load(scales + at)


@triton.jit
def shift_of(scale, offset, middle: tl.constexpr):
    """What to subtract for each input summed, in float32: offset - middle * scale."""
    return offset.to(tl.float32) - middle * scale.to(tl.float32)
