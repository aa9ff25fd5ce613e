"""What the kernels ask of the tensors they are given.

Purpose: turn tensors into what the C interface takes, or say what is wrong with them.
Does not know: the library.
Invariant: a tensor that does not fit raises ValueError naming what was needed and what came.
"""

from __future__ import annotations

from typing import Final

import torch

DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x `[..., D]` as R rows of D adjacent elements: (tensor to point at, R, D, elements from row to row)."""
    size: int = x.shape[-1]
    if x.is_contiguous() and size:
        return x, x.numel() // size, size, size
    flat = x if x.dim() == 2 else x.reshape(-1, size)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.shape[0], size, flat.stride(0)


def alike(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of x's shape and dtype."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose last dimension is adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def float_code(x: torch.Tensor) -> int:
    """Number of a float dtype in the C interface. Raises ValueError, also for another device than the CPU."""
    dtype = x.dtype
    if x.is_cpu:
        if dtype is torch.bfloat16:
            return 1
        if dtype is torch.float32:
            return 0
    raise ValueError(f"native kernels compute in float32 or bfloat16 on the CPU, got {describe(x)}")


def per_head(name: str, values: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """values `[heads]` as contiguous float32; None stays None. Raises ValueError."""
    if values is None:
        return None
    if values.shape != (heads,):
        raise ValueError(f"{name} must be [{heads}], got {describe(values)}")
    return values.detach().to(torch.float32).contiguous()


def check_cache(
    key: torch.Tensor, value: torch.Tensor, key_scale: torch.Tensor | None, value_scale: torch.Tensor | None
) -> None:
    """Raises ValueError unless these are the tensors of one paged cache."""
    if key.dtype not in DTYPE_CODES or key.dtype is not value.dtype or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"caches must be two [N, BS, Hkv, D] of float32, bfloat16 or int8; "
            f"got {describe(key)} and {describe(value)}"
        )
    if not key.is_contiguous() or not value.is_contiguous():
        raise ValueError("caches must be contiguous")
    if key.dtype is torch.int8:
        for scales in (key_scale, value_scale):
            if (
                scales is None
                or scales.dtype is not torch.float32
                or scales.shape != key.shape[:3]
                or not scales.is_contiguous()
            ):
                raise ValueError(f"an int8 cache needs contiguous float32 scales {list(key.shape[:3])}")


def check_step(block_tables: torch.Tensor, query_starts: torch.Tensor, context_lens: torch.Tensor) -> None:
    """Raises ValueError unless these are the int32 tables of one step."""
    s = block_tables.shape[0]
    for name, tensor, shape in (
        ("query_starts", query_starts, (s + 1,)),
        ("context_lens", context_lens, (s,)),
    ):
        if tensor.dtype is not torch.int32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 {list(shape)}, got {describe(tensor)}")
    if block_tables.dtype is not torch.int32 or (block_tables.shape[1] > 1 and block_tables.stride(1) != 1):
        raise ValueError(f"block_tables must be int32 with adjacent columns, got {describe(block_tables)}")


def describe(x: torch.Tensor) -> str:
    """Dtype and shape, for a message."""
    device = "" if x.is_cpu else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}{device}"
