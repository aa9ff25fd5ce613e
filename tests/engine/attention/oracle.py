"""A paged step with random numbers, and what attention over it must give, computed in float64 token by token.

For the tests of every backend. The oracle knows nothing of pages: it keeps each sequence's keys and values in
a row, as they come back from the cache's number format. All cache entries that no sequence owns are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memory_efficient_gpt.attention.context import AttentionBackend, AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.kv_cache.geometry import LayerKV


@dataclass(frozen=True)
class Shape:
    """Heads and head sizes of a layer."""

    query_heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16


@dataclass
class PagedStep:
    """A step ready to be computed; `history` has each row's keys `[n, Hkv, Dk]` and values, all positions."""

    shape: Shape
    cache: LayerCache
    context: StepContext
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    history: list[tuple[torch.Tensor, torch.Tensor]]
    query_lens: list[int]

    def run(self, backend: AttentionBackend, options: AttentionOptions) -> torch.Tensor:
        """Write this step's keys and values, attend; `[T, Hq, Dv]`."""
        backend.write(self.key, self.value, self.cache, self.context)
        return backend.attend(self.query, self.cache, self.context, options)


def make_step(
    backend: AttentionBackend,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    block_size: int = 4,
    host_lengths: bool = True,
    seed: int = 0,
) -> PagedStep:
    """Rows of given lengths over shuffled blocks; keys of earlier steps are already in the cache."""
    shape = shape or Shape()
    cache_dtype = cache_dtype or dtype
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length in context_lens]
    cache = _poisoned_cache(shape, sum(needed) + 3, block_size, cache_dtype)
    order = (torch.randperm(cache.key.shape[0] - 1, generator=generator) + 1).tolist()
    tables = torch.zeros((len(needed), max(needed)), dtype=torch.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])

    def draw(count: int, heads: int, size: int) -> torch.Tensor:
        return torch.randn((count, heads, size), generator=generator).to(dtype)

    def slots_of(row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return tables[row, positions // block_size].long() * block_size + positions % block_size

    history = []
    keys, values, slots = [], [], []
    for row, (new, total) in enumerate(zip(query_lens, context_lens, strict=True)):
        key, value = draw(total, shape.kv_heads, shape.key_dim), draw(total, shape.kv_heads, shape.value_dim)
        earlier = total - new
        before = _context(backend, slots_of(row, 0, earlier), tables, query_lens, context_lens, host_lengths)
        backend.write(key[:earlier], value[:earlier], cache, before)
        keys.append(key[earlier:])
        values.append(value[earlier:])
        slots.append(slots_of(row, earlier, total))
        history.append((stored_numbers(key, cache_dtype), stored_numbers(value, cache_dtype)))
    return PagedStep(
        shape=shape,
        cache=cache,
        context=_context(backend, torch.cat(slots), tables, query_lens, context_lens, host_lengths),
        query=draw(sum(query_lens), shape.query_heads, shape.key_dim),
        key=torch.cat(keys),
        value=torch.cat(values),
        history=history,
        query_lens=list(query_lens),
    )


def expected(step: PagedStep, options: AttentionOptions) -> torch.Tensor:
    """The definition, in float64: `[T, Hq, Dv]`."""
    outputs = []
    token = 0
    for new, (keys, values) in zip(step.query_lens, step.history, strict=True):
        total = keys.shape[0]
        for position in range(total - new, total):
            outputs.append(_one_token(step, options, step.query[token].double(), keys, values, position))
            token += 1
    return torch.stack(outputs)


def stored_numbers(numbers: torch.Tensor, cache_dtype: torch.dtype) -> torch.Tensor:
    """What a cache of that type gives back for `numbers` `[n, H, D]`, in float64."""
    if cache_dtype not in (torch.int8, torch.float8_e4m3fn):
        return numbers.to(cache_dtype).double()
    largest = 127 if cache_dtype is torch.int8 else 448
    scale = numbers.float().abs().amax(dim=-1, keepdim=True) / largest
    codes = numbers.float() / scale
    codes = codes.round() if cache_dtype is torch.int8 else codes.to(cache_dtype).float()
    return (codes * scale).double()


def _one_token(
    step: PagedStep,
    options: AttentionOptions,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
) -> torch.Tensor:
    first = 0 if options.window is None else max(0, position - options.window + 1)
    heads = []
    for head in range(step.shape.query_heads):
        kv_head = head // (step.shape.query_heads // step.shape.kv_heads)
        logits = []
        for seen in range(first, position + 1):
            logit = options.scale * float(query[head] @ keys[seen, kv_head])
            if options.softcap is not None:
                logit = options.softcap * math.tanh(logit / options.softcap)
            if options.alibi_slopes is not None:
                logit += float(options.alibi_slopes[head]) * (seen - position)
            logits.append(logit)
        weights = [math.exp(logit) for logit in logits]
        sink = 0.0 if options.sinks is None else math.exp(float(options.sinks[head]))
        shares = torch.tensor(weights, dtype=torch.float64) / (sum(weights) + sink)
        heads.append(shares @ values[first : position + 1, kv_head])
    return torch.stack(heads)


def _poisoned_cache(shape: Shape, num_blocks: int, block_size: int, dtype: torch.dtype) -> LayerCache:
    spec = LayerKV("layer", shape.kv_heads, shape.key_dim, shape.value_dim, shape.query_heads)
    pages = (num_blocks, block_size, shape.kv_heads)
    if dtype in (torch.int8, torch.float8_e4m3fn):
        return LayerCache(
            spec,
            torch.full((*pages, shape.key_dim), 99, dtype=dtype),
            torch.full((*pages, shape.value_dim), 99, dtype=dtype),
            torch.full(pages, torch.nan),
            torch.full(pages, torch.nan),
        )
    return LayerCache(
        spec,
        torch.full((*pages, shape.key_dim), torch.nan, dtype=dtype),
        torch.full((*pages, shape.value_dim), torch.nan, dtype=dtype),
    )


def _context(
    backend: AttentionBackend,
    slots: torch.Tensor,
    tables: torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    host_lengths: bool,
) -> StepContext:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return StepContext(
        backend=backend,
        slots=slots,
        block_tables=tables,
        query_starts=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        host_query_lens=list(query_lens) if host_lengths else None,
        host_context_lens=list(context_lens) if host_lengths else None,
    )
