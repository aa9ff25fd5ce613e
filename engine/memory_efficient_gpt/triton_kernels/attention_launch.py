"""Launches of the attention kernels: sizes of tiles, workspaces, arguments.

Purpose: from tensors to kernels.
Does not know: which launches a step needs (attention/triton.py).
Invariant: tile sizes depend on head sizes and dtypes only, never on the step; splits also on how many rows a
step has and how long they may be, but where sums must not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
import triton

from memory_efficient_gpt.triton_kernels.availability import overlap_options
from memory_efficient_gpt.triton_kernels.fixed_attention import fixed_prompt_kernel
from memory_efficient_gpt.triton_kernels.paged_attention import (
    join_splits_kernel,
    paged_attention_kernel,
    write_kv_kernel,
)

READS_AHEAD: Final = 256
"""Up to so many rows times KV heads, decoding kernels read lengths and block numbers before the kernel before
has ended, and block numbers one tile earlier. It takes more registers, which costs more where there are more
programs than the device runs at a time."""
LEAST_SPLIT: Final = 128
MOST_SPLITS: Final = 32
"""A decoding row is walked in splits of LEAST_SPLIT keys, of longer ones (doubled) if these are too many. It
depends on the row alone, so that its sums don't depend on the batch."""
_MANY_KEYS: Final = 100_000
_SOME_ROWS: Final = 64
_MANY_ROWS: Final = 700
_FIXED_ROWS: Final = 32
_WIDE_ROWS: Final = 64
"""Queries from which tensor cores' larger products are used, which may add in another order."""


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


@dataclass(frozen=True, slots=True)
class LaunchSizes:
    """rows: queries of a program; tile: keys of a step; warps, stages: Triton's."""

    rows: int
    tile: int
    warps: int
    stages: int


def decode_sizes(query: torch.Tensor, group: int, value_dim: int, *, quantized: bool) -> LaunchSizes:
    """For rows with one query token. Measured on an H200; more warps convert 8-bit keys more than once."""
    tile = 32 if _is_wide(query, value_dim) else 64
    rows = max(16, triton.next_power_of_2(group))
    return LaunchSizes(rows, tile, warps=2 if quantized else 4, stages=2)


def prompt_sizes(query: torch.Tensor, group: int, value_dim: int) -> LaunchSizes:
    """For rows with several."""
    wide = _is_wide(query, value_dim)
    rows = max(16, triton.next_power_of_2(group), 64 if wide else 128)
    return LaunchSizes(rows, 32 if wide else 64, warps=8 if rows >= 128 else 4, stages=2)


def fixed_sizes(query: torch.Tensor, group: int, value_dim: int, *, quantized: bool) -> LaunchSizes:
    """For tokens of prompts whose sums are those of decoding rows: the same tiles of keys."""
    decode = decode_sizes(query, group, value_dim, quantized=quantized)
    return LaunchSizes(max(_FIXED_ROWS, decode.rows), decode.tile, warps=4, stages=2)


def least_split(rows: int, heads: int, longest: int) -> int:
    """Keys of the shortest splits of a step with so many decoding rows, of up to so many keys each.

    Programs of short splits spend much of their time before their first key, but there must be some for each
    multiprocessor. Rows of equal padded steps get equal splits. Measured on an H200
    (`python -m benchmarks.attention_gpu --splits`).
    """
    programs = rows * heads
    least = LEAST_SPLIT
    if programs > _MANY_ROWS:
        least *= 4
    elif programs * longest > _MANY_KEYS:
        least *= 2
    while programs >= _SOME_ROWS and 8 * least < longest and least < 8 * LEAST_SPLIT:
        least *= 2
    return least


def decode_rows(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor, rows: int,
    max_context: int, precision: str, sizes: LaunchSizes | None = None, *, fixed: bool = False,
    least: int | None = None,
) -> None:  # fmt: skip
    """Outputs of the rows with one query token. sizes and least: instead of the usual ones (benchmarks).

    fixed: sums are those of `fixed_prompt_chunks`, whatever else is in the step.
    """
    heads, group, value_dim = _heads(query, cache)
    least = least or (LEAST_SPLIT if fixed else least_split(rows, heads, max_context))
    ahead = rows * heads <= READS_AHEAD
    splits = max(1, min(MOST_SPLITS, -(-max_context // least)))
    partial = torch.empty(
        (rows, heads, splits, group, value_dim + 2), dtype=torch.float32, device=query.device
    )
    sizes = sizes or decode_sizes(query, group, value_dim, quantized=cache.key_scale is not None)
    if fixed and sizes.rows >= _WIDE_ROWS:
        sizes = replace(sizes, warps=4)
    _attend(
        (heads, rows, splits), query, cache, step, options, out, partial, rows, sizes, precision, decode=True,
        fixed=fixed, least=least, ahead=ahead,
    )  # fmt: skip
    window = options.window or 0
    with _device(query):
        join_splits_kernel[(rows, heads * group)](
            partial, step.query_starts, step.context_lens, _or(options.sinks, query), out, splits, window,
            least, H=heads, G=group, DV=value_dim, PV=triton.next_power_of_2(value_dim), MOST=MOST_SPLITS,
            has_sinks=options.sinks is not None, num_warps=1 if value_dim <= 64 else 2,
            enable_fp_fusion=not fixed, ahead=ahead, **overlap_options(query.device),
        )  # fmt: skip


def prompt_chunks(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor, rows: int,
    precision: str, sizes: LaunchSizes | None = None,
) -> None:  # fmt: skip
    """Outputs of the rows with several query tokens. sizes: instead of the usual ones (benchmarks)."""
    heads, group, value_dim = _heads(query, cache)
    sizes = sizes or prompt_sizes(query, group, value_dim)
    grid = (query.shape[0] // (sizes.rows // group) + rows, heads, 1)
    _attend(
        grid, query, cache, step, options, out, out, rows, sizes, precision, decode=False, fixed=False,
        least=LEAST_SPLIT, ahead=False,
    )  # fmt: skip


def fixed_prompt_chunks(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor, rows: int,
    precision: str,
) -> None:  # fmt: skip
    """As `prompt_chunks`; each token's output has the bits that `decode_rows` (fixed) gives it."""
    heads, group, value_dim = _heads(query, cache)
    sizes = fixed_sizes(query, group, value_dim, quantized=cache.key_scale is not None)
    grid = (query.shape[0] // (sizes.rows // group) + rows, heads)
    query = _rows_contiguous(query)
    with _device(query):
        fixed_prompt_kernel[grid](
            *_tensors(query, cache, step, options, out), *_numbers(query, step, options, rows),
            **_constants(query, cache, options, sizes), LEAST=LEAST_SPLIT, precision=precision,
            num_warps=sizes.warps, num_stages=sizes.stages, enable_fp_fusion=False,
            **overlap_options(query.device),
        )  # fmt: skip


def write_kv(
    key: torch.Tensor, value: torch.Tensor, cache: Cache, slots: torch.Tensor, largest: float
) -> None:
    """key `[T, H, Dk]` and value `[T, H, Dv]` into the cache at slots `[T]`; with scales quantized."""
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[2]
    key, value = _rows_contiguous(key), _rows_contiguous(value)
    if tokens == 0:
        return
    with _device(key):
        write_kv_kernel[(tokens, heads)](
            key, value, cache.key, cache.value, _or(cache.key_scale, key), _or(cache.value_scale, key),
            slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1), largest, H=heads,
            DK=key_dim, DV=value_dim, PK=triton.next_power_of_2(key_dim),
            PV=triton.next_power_of_2(value_dim), quantized=cache.key_scale is not None,
            rounded=cache.key.dtype is torch.int8, num_warps=1, **overlap_options(key.device),
        )  # fmt: skip


def _attend(
    grid: tuple[int, int, int], query: torch.Tensor, cache: Cache, step: Step, options: Options,
    out: torch.Tensor, partial: torch.Tensor, rows: int, sizes: LaunchSizes, precision: str, *, decode: bool,
    fixed: bool, least: int, ahead: bool,
) -> None:  # fmt: skip
    query = _rows_contiguous(query)
    with _device(query):
        paged_attention_kernel[grid](
            *_tensors(query, cache, step, options, out), partial, *_numbers(query, step, options, rows),
            least, **_constants(query, cache, options, sizes), decode=decode, precision=precision,
            fixed=fixed, num_warps=sizes.warps, num_stages=sizes.stages,
            enable_fp_fusion=not fixed,  # which operations are fused may differ between kernels
            ahead=ahead, **overlap_options(query.device),
        )  # fmt: skip


def _tensors(
    query: torch.Tensor, cache: Cache, step: Step, options: Options, out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (
        query, cache.key, cache.value, _or(cache.key_scale, query), _or(cache.value_scale, query),
        step.block_tables, step.query_starts, step.context_lens, _or(options.sinks, query),
        _or(options.alibi_slopes, query), out,
    )  # fmt: skip


def _numbers(query: torch.Tensor, step: Step, options: Options, rows: int) -> tuple[float, ...]:
    return (
        query.stride(0), query.stride(1), rows, step.block_tables.stride(0), options.scale,
        options.softcap or 1.0, options.window or 0,
    )  # fmt: skip


def _constants(query: torch.Tensor, cache: Cache, options: Options, sizes: LaunchSizes) -> dict[str, Any]:
    heads, group, value_dim = _heads(query, cache)
    return dict(
        H=heads, G=group, BS=cache.key.shape[1], DK=query.shape[2], DV=value_dim,
        PK=max(16, triton.next_power_of_2(query.shape[2])), PV=max(16, triton.next_power_of_2(value_dim)),
        BM=sizes.rows, TILE=sizes.tile, MOST=MOST_SPLITS, quantized=cache.key_scale is not None,
        has_sinks=options.sinks is not None, has_slopes=options.alibi_slopes is not None,
        has_softcap=options.softcap is not None,
    )  # fmt: skip


def _heads(query: torch.Tensor, cache: Cache) -> tuple[int, int, int]:
    """KV heads, query heads of each, size of a value."""
    heads = cache.key.shape[2]
    return heads, query.shape[1] // heads, cache.value.shape[3]


def _is_wide(query: torch.Tensor, value_dim: int) -> bool:
    """Whether tiles of keys must be short to fit into shared memory."""
    return max(query.shape[2], value_dim) * query.element_size() > 256 or query.dtype is torch.float32


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel's argument that is not read is any tensor."""
    return tensor if tensor is not None else other


def _device(tensor: torch.Tensor) -> Any:
    return torch.cuda.device(tensor.device)
