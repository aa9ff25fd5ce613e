"""The launch of rotary positions, after norms of heads, with the write to the paged cache.

Purpose: from tensors to the kernel.
Does not know: models, when these follow each other (native/deferral.py).
Invariant: no host synchronization and no allocation but copies of inputs whose last dimension has gaps.

Letters: T tokens, H heads, D and DV elements of a key and of a value, P the elements of a key that turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton

from memory_efficient_gpt.triton_kernels.attention_launch import Cache
from memory_efficient_gpt.triton_kernels.availability import overlap_options
from memory_efficient_gpt.triton_kernels.layers import check_rotary, last_adjacent, rotary_sizes, warps_for
from memory_efficient_gpt.triton_kernels.turned_write_kernel import turned_write_kernel


class Norm(Protocol):
    """An RMS norm over heads (native/deferred_calls.py)."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def eps(self) -> float: ...
    @property
    def style(self) -> str: ...


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of queries and keys in one style, and tensors like query and key for their results."""

    query: Norm
    key: Norm
    kept: tuple[torch.Tensor, torch.Tensor]


def turn_and_write(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor], cache: Cache, slots: torch.Tensor, largest: float,
    norms: HeadNorms | None = None,
) -> None:  # fmt: skip
    """Turn query `[1, Hq, T, D]` and key `[1, H, T, D]` by cos and sin `[1, T, P]`; store key and value.

    out: the turned ones, views of contiguous `[1, T, H, D]`. The turned key and value `[T, H, DV]` go into
    the cache at slots `[T]`, quantized to at most `largest` if it has scales. norms: of query and
    key, before they are turned. Raises ValueError as `TritonKernels.rotate` does.
    """
    check_rotary(query, key, cos, sin)
    query, key, value, cos, sin = (last_adjacent(x) for x in (query, key, value, cos, sin))
    (tokens, size), part, value_dim = query.shape[2:], cos.shape[2], value.shape[2]
    half, block = rotary_sizes(query, key, part)
    if tokens == 0:
        return
    key_scale = cache.key_scale if cache.key_scale is not None else key
    value_scale = cache.value_scale if cache.value_scale is not None else key
    blocks = -(-query.shape[1] // block) - 2 * (-key.shape[1] // block)
    kept = norms.kept if norms is not None else (query, key)
    weights = (norms.query.weight, norms.key.weight) if norms is not None else (query, key)
    with torch.cuda.device(query.device):
        turned_write_kernel[(tokens, blocks)](
            query, key, value, cos, sin, *weights, *kept, *out, cache.key, cache.value, key_scale,
            value_scale, slots, query.stride(2), query.stride(1), key.stride(2), key.stride(1),
            value.stride(0), value.stride(1), kept[0].stride(2), kept[0].stride(1), kept[1].stride(2),
            kept[1].stride(1), cos.stride(1), sin.stride(1), norms.query.eps if norms is not None else 0.0,
            norms.key.eps if norms is not None else 0.0, largest, HQ=query.shape[1], H=key.shape[1], D=size,
            PD=triton.next_power_of_2(size), DV=value_dim, PV=triton.next_power_of_2(value_dim), P=part,
            HALF=half, REST=triton.next_power_of_2(max(1, size - part)), BLOCK=block,
            quantized=cache.key_scale is not None, rounded=cache.key.dtype is torch.int8,
            normed=norms is not None, style=norms.query.style if norms is not None else "",
            num_warps=warps_for(2 * block * half), enable_fp_fusion=norms is not None and _rounds(query),
            **overlap_options(query.device),
        )  # fmt: skip


def _rounds(x: torch.Tensor) -> bool:
    """Whether products are rounded before they are added, so that none becomes a fused multiply-add."""
    return x.dtype is not torch.float32
