"""Rows of a tensor, as launches address them.

Purpose: `[..., D]` as rows one or two strides apart, whatever views it came through.
Does not know: kernels; needs no Triton.
Invariant: a copy is made only where no such strides exist.
"""

from __future__ import annotations

import math

import torch


def two_strides(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x `[..., D]` as rows two strides apart: (tensor, rows of the inner stride, outer and inner stride)."""
    size = x.shape[-1]
    if x.is_contiguous():
        return x, 1, size, size
    sizes = [n for n in x.shape[:-1] if n > 1]
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if x.stride(-1) == 1 or size == 1:
        for split in range(len(sizes) + 1):
            if _nested(sizes[:split], strides[:split]) and _nested(sizes[split:], strides[split:]):
                outer = strides[split - 1] if split else size
                inner = strides[-1] if split < len(sizes) else size
                return x, math.prod(sizes[split:]), outer, inner
    return x.contiguous(), 1, size, size


def _nested(sizes: list[int], strides: list[int]) -> bool:
    """Whether these dimensions are as one whose stride is the last one's."""
    return all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))


def one_stride(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x `[..., D]` as rows one stride apart; a copy where it is not so."""
    same, inner, outer_stride, inner_stride = two_strides(x)
    if inner == 1:
        return same, outer_stride
    if inner * x.shape[-1] == same.numel():
        return same, inner_stride
    return same.contiguous(), x.shape[-1]
