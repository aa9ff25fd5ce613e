"""The search for a group's scale (and offset), as rounding.py does it in torch, in one pass over the weight.

Purpose: `search_scales` on a CUDA device: 25 trial scales a group, each refitted by least squares.
Does not know: codes' packing, schemes' names.
Invariant: finds what the search in torch finds but for ties and float32's rounding.

Letters: N outputs, K inputs, S inputs of a group, G groups of an output; R groups a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 4096  # of a program's tile
_MOST_INPUTS = 1 << 15
TRIALS = tl.constexpr(25)
TINY = tl.constexpr(1e-30)


def can_search(group_size: int | None, num_inputs: int) -> bool:
    """Whether a group fits a program's tile."""
    return (group_size or num_inputs) <= _MOST_INPUTS


def search_scales(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales `[N, G] float32` and offsets (None: symmetric) of a weight `[N, K]` on a CUDA device."""
    n, k = weight.shape
    size = group_size or k
    groups = -(-k // size)
    block = triton.next_power_of_2(size)
    rows = max(1, _ELEMENTS // block)
    scales = torch.empty((n, groups), dtype=torch.float32, device=weight.device)
    offsets = torch.empty_like(scales) if not symmetric else None
    weight = weight.contiguous()
    counts = importance.to(weight.device, torch.float32).contiguous() if importance is not None else None
    with torch.cuda.device(weight.device):
        search_kernel[(-(-n * groups // rows),)](
            weight, counts if counts is not None else weight, scales,
            offsets if offsets is not None else scales,
            n * groups, groups, k, size, bits=bits, symmetric=symmetric, weighted=counts is not None,
            R=rows, BLOCK=block, num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return scales, offsets


@triton.jit
def _rint(x):
    """To the nearest integer, halves to even, for less than 2^22 in magnitude."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def search_kernel(
    weight, importance, scales, offsets, total, G, K, S,
    bits: tl.constexpr, symmetric: tl.constexpr, weighted: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N * G / R)). weight `[N, K]`, importance `[K]`, scales and offsets `[N * G]`."""
    place = tl.program_id(0) * R + tl.arange(0, R)
    ri = tl.arange(0, BLOCK)
    k = (place % G)[:, None] * S + ri[None, :]
    real = (ri < S)[None, :] & (k < K) & (place < total)[:, None]
    w = tl.load(weight + (place // G).to(tl.int64)[:, None] * K + k, mask=real, other=0.0).to(tl.float32)
    c = tl.load(importance + k, mask=real, other=0.0) if weighted else tl.where(real, 1.0, 0.0)
    best = tl.full([R], float("inf"), tl.float32)
    if symmetric:
        middle: tl.constexpr = 1 << (bits - 1)
        high, low = tl.max(w, axis=1), tl.min(w, axis=1)
        extreme = tl.where(high >= -low, high, low)
        base = tl.where(tl.abs(extreme) < TINY, TINY, -extreme / middle)
        found = base
        for i in range(TRIALS):
            trial = base * (1.15 - 0.025 * i)
            codes = tl.minimum(tl.maximum(_rint(w / trial[:, None]), -middle), middle - 1)
            norm = tl.sum(c * codes * codes, axis=1)
            scale = tl.where(norm > 0, tl.sum(c * w * codes, axis=1) / tl.maximum(norm, TINY), trial)
            rest = w - scale[:, None] * codes
            error = tl.sum(c * rest * rest, axis=1)
            found = tl.where(error < best, scale, found)
            best = tl.minimum(error, best)
        tl.store(scales + place, found, mask=place < total)
    else:
        levels: tl.constexpr = (1 << bits) - 1
        low = tl.minimum(tl.min(tl.where(real, w, 0.0), axis=1), 0.0)
        high = tl.maximum(tl.max(tl.where(real, w, 0.0), axis=1), 0.0)
        base = tl.maximum((high - low) / levels, TINY)
        centre = levels / 2 * base + low
        count = tl.maximum(tl.sum(c, axis=1), TINY)
        mean_weight = tl.sum(c * w, axis=1) / count
        found = base
        found_offset = -low
        for i in range(TRIALS):
            trial = base * (1.15 - 0.025 * i)
            start = levels / 2 * trial - centre
            codes = tl.minimum(tl.maximum(_rint((w + start[:, None]) / trial[:, None]), 0.0), levels)
            mean_code = tl.sum(c * codes, axis=1) / count
            d = codes - mean_code[:, None]
            spread = tl.sum(c * d * d, axis=1)
            common = tl.sum(c * d * (w - mean_weight[:, None]), axis=1)
            usable = (spread > 0) & (common > 0)
            scale = tl.where(usable, common / tl.maximum(spread, TINY), trial)
            offset = tl.where(usable, scale * mean_code - mean_weight, start)
            rest = w - (scale[:, None] * codes - offset[:, None])
            error = tl.sum(c * rest * rest, axis=1)
            found = tl.where(error < best, scale, found)
            found_offset = tl.where(error < best, offset, found_offset)
            best = tl.minimum(error, best)
        tl.store(scales + place, found, mask=place < total)
        tl.store(offsets + place, found_offset, mask=place < total)
