"""Launches of the attention kernels: sizes of tiles, workspaces, arguments.

Purpose: from tensors to kernels.
Does not know: which launches a step needs (attention/triton.py).
Invariant: tile sizes depend on head sizes and dtypes only, never on the step.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton

from memory_efficient_gpt.triton_kernels.paged_attention import (
    join_splits_kernel,
    paged_attention_kernel,
    write_kv_kernel,
)


class Cache(Protocol):
    """What a layer's cache has (kv_cache/pool.py)."""

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None


class Step(Protocol):
    """What is read of a step (attention/context.py)."""

    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor


class Options(Protocol):
    """What one attention call asks for (attention/context.py)."""

    @property
    def scale(self) -> float: ...
    @property
    def window(self) -> int | None: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def sinks(self) -> torch.Tensor | None: ...
    @property
    def alibi_slopes(self) -> torch.Tensor | None: ...


def decode_rows(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor, rows: int,
    splits: int, split: int, precision: str,
) -> None:  # fmt: skip
    """Outputs of the rows with one query token, in splits of `split` keys."""
    heads, group, value_dim = _heads(query, cache)
    partial = torch.empty(
        (rows, heads, splits, group, value_dim + 2), dtype=torch.float32, device=query.device
    )
    wide = _is_wide(query, value_dim)
    _attend(
        (rows, heads, splits), query, cache, step, options, out, partial, rows, tile=32 if wide else 64,
        rows_of_tile=max(16, triton.next_power_of_2(group)), split=split, decode=True, precision=precision,
        warps=4, stages=3,
    )  # fmt: skip
    window = options.window or 0
    with _device(query):
        join_splits_kernel[(rows, heads * group)](
            partial, step.query_starts, step.context_lens, _or(options.sinks, query), out, splits, window,
            H=heads, G=group, DV=value_dim, PV=triton.next_power_of_2(value_dim), SPLIT=split,
            has_sinks=options.sinks is not None, num_warps=1 if value_dim <= 64 else 2,
        )  # fmt: skip


def prompt_chunks(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor, rows: int,
    precision: str,
) -> None:  # fmt: skip
    """Outputs of the rows with several query tokens."""
    heads, group, value_dim = _heads(query, cache)
    wide = _is_wide(query, value_dim)
    rows_of_tile = max(16, triton.next_power_of_2(group), 64 if wide else 128)
    tokens_of_tile = rows_of_tile // group
    grid = (query.shape[0] // tokens_of_tile + rows, heads, 1)
    _attend(
        grid, query, cache, step, options, out, out, rows, tile=32 if wide else 64, rows_of_tile=rows_of_tile,
        split=1, decode=False, precision=precision, warps=8 if rows_of_tile >= 128 else 4, stages=2,
    )  # fmt: skip


def write_kv(
    source: torch.Tensor,
    pages: torch.Tensor,
    scales: torch.Tensor | None,
    slots: torch.Tensor,
    largest: float,
) -> None:
    """source `[T, H, D]` into pages `[N, BS, H, D]` at slots `[T]`; with scales `[N, BS, H]` quantized."""
    tokens, heads, dim = source.shape
    if source.stride(2) != 1:
        source = source.contiguous()
    if tokens == 0:
        return
    with _device(source):
        write_kv_kernel[(tokens, heads)](
            source, pages, _or(scales, source), slots, source.stride(0), source.stride(1), largest,
            H=heads, D=dim, P=triton.next_power_of_2(dim), quantized=scales is not None,
            rounded=pages.dtype is torch.int8, num_warps=1,
        )  # fmt: skip


def _attend(
    grid: tuple[int, int, int], query: torch.Tensor, cache: Cache, step: Step, options: Options,
    out: torch.Tensor, partial: torch.Tensor, rows: int, *, tile: int, rows_of_tile: int, split: int,
    decode: bool, precision: str, warps: int, stages: int,
) -> None:  # fmt: skip
    heads, group, value_dim = _heads(query, cache)
    with _device(query):
        paged_attention_kernel[grid](
            query, cache.key, cache.value, _or(cache.key_scale, query), _or(cache.value_scale, query),
            step.block_tables, step.query_starts, step.context_lens, _or(options.sinks, query),
            _or(options.alibi_slopes, query), out, partial, rows, step.block_tables.stride(0), options.scale,
            options.softcap or 1.0, options.window or 0, H=heads, G=group, BS=cache.key.shape[1],
            DK=query.shape[2], DV=value_dim, PK=max(16, triton.next_power_of_2(query.shape[2])),
            PV=max(16, triton.next_power_of_2(value_dim)), BM=rows_of_tile, TILE=tile, SPLIT=split,
            quantized=cache.key_scale is not None, has_sinks=options.sinks is not None,
            has_slopes=options.alibi_slopes is not None, has_softcap=options.softcap is not None,
            decode=decode, precision=precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _heads(query: torch.Tensor, cache: Cache) -> tuple[int, int, int]:
    """KV heads, query heads of each, size of a value."""
    heads = cache.key.shape[2]
    return heads, query.shape[1] // heads, cache.value.shape[3]


def _is_wide(query: torch.Tensor, value_dim: int) -> bool:
    """Whether tiles of keys must be short to fit into shared memory."""
    return max(query.shape[2], value_dim) * query.element_size() > 256 or query.dtype is torch.float32


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel's argument that is not read is any tensor."""
    return tensor if tensor is not None else other


def _device(tensor: torch.Tensor) -> Any:
    return torch.cuda.device(tensor.device)
