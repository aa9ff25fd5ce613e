"""Paged attention in plain PyTorch, on any device, for every feature.

Purpose: the portable backend: gather the pages that a step needs, then torch's own attention, or explicit
float32 mathematics where that has no such feature.
Does not know: models, the scheduler; reads the step's metadata only.
Invariant: no host synchronization when the context carries host lengths or one query token a row.

Query heads that share a KV head are packed into one matrix of queries, so keys and values are never
repeated. Rows with one query token are computed together; the others, each a prompt's chunk, one by one.

Letters: B rows, H kv heads, G query heads for each of them, n query tokens, L keys, D head size.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.torch_layout import Chunk, RowBatch, step_layout

MAX_SCORES: Final = 1 << 25
"""Attention scores held at once for a prompt's chunk: 128 MiB of float32."""
_LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class TorchBackend:
    """Gathered pages and scaled_dot_product_attention; softcap, sinks and ALiBi in explicit float32."""

    name = "torch"

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext) -> None:
        """Store key `[T, Hkv, Dk]` and value `[T, Hkv, Dv]` at `context.slots`; changes the cache."""
        _store(key, cache.key, cache.key_scale, context.slots)
        _store(value, cache.value, cache.value_scale, context.slots)

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, Dk]` over the cache; returns `[T, Hq, Dv]`, query's dtype.

        Tokens that belong to no row come out as zeros.
        """
        layout = step_layout(context, cache, options.window, query.shape[0])
        if layout.single is not None:
            return _attend_rows(query, cache, layout.single, options)
        output = query.new_zeros((query.shape[0], query.shape[1], cache.value.shape[3]))
        for batch in layout.batches:
            assert batch.tokens is not None  # only a layout's single batch has none
            attended = _attend_rows(query.index_select(0, batch.tokens), cache, batch, options)
            output.index_copy_(0, batch.tokens, attended)
        for chunk in layout.chunks:
            own = slice(chunk.start, chunk.start + chunk.num_tokens)
            output[own] = _attend_chunk(query[own], cache, chunk, options)
        return output


def _store(
    source: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor
) -> None:
    """source `[T, H, D]` into pages `[N, BS, H, D]`; with scales `[N, BS, H]`, as symmetric int8 or fp8."""
    _, _, heads, size = pages.shape
    if scales is not None:
        largest = _LARGEST[pages.dtype]
        numbers = source.float()
        scale = numbers.abs().amax(dim=-1) / largest
        safe = scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        source = (numbers / safe).clamp(-largest, largest)
        if pages.dtype is torch.int8:
            source = source.round()
        scales.view(-1, heads).index_copy_(0, slots, scale)
    _movable(pages).view(-1, heads, size).index_copy_(0, slots, _movable(source.to(pages.dtype)))


def _gather(
    pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Slots `[B, L]` of pages `[N, BS, H, D]`, dequantized -> a copy `[B, H, L, D]` (strided)."""
    _, _, heads, size = pages.shape
    index = slots.reshape(-1)
    numbers = _movable(pages).view(-1, heads, size).index_select(0, index)
    if scales is not None:
        scale = scales.view(-1, heads).index_select(0, index).unsqueeze(-1)
        numbers = numbers.view(pages.dtype).float() * scale
    return numbers.to(dtype).view(*slots.shape, heads, size).transpose(1, 2)


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits in a dtype that torch's indexing functions know."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def _attend_rows(
    query: torch.Tensor, cache: LayerCache, batch: RowBatch, options: AttentionOptions
) -> torch.Tensor:
    """query `[B, Hq, Dk]`, one token a row -> `[B, Hq, Dv]`."""
    rows, query_heads, _ = query.shape
    keys = _gather(cache.key, cache.key_scale, batch.slots, query.dtype)
    values = _gather(cache.value, cache.value_scale, batch.slots, query.dtype)
    packed = query.reshape(rows, keys.shape[1], -1, 1, query.shape[2])
    visible, distance = batch.visible.unsqueeze(1), batch.distance.unsqueeze(1)
    return _attend(packed, keys, values, visible, distance, options).reshape(rows, query_heads, -1)


def _attend_chunk(
    query: torch.Tensor, cache: LayerCache, chunk: Chunk, options: AttentionOptions
) -> torch.Tensor:
    """query `[n, Hq, Dk]`, consecutive tokens of one row -> `[n, Hq, Dv]`."""
    num_tokens, query_heads, _ = query.shape
    num_keys = chunk.slots.shape[1]
    keys = _gather(cache.key, cache.key_scale, chunk.slots, query.dtype)
    values = _gather(cache.value, cache.value_scale, chunk.slots, query.dtype)
    if _is_plain(options) and num_keys == num_tokens and num_keys <= (options.window or num_keys):
        heads_first = query.transpose(0, 1).unsqueeze(0)
        attended = scaled_dot_product_attention(
            heads_first, keys, values, is_causal=True, scale=options.scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1)
    tile = max(1, MAX_SCORES // (num_keys * query_heads))
    parts = [
        _attend_tile(query[at : at + tile], keys, values, chunk, at, options)
        for at in range(0, num_tokens, tile)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_tile(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    offset: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Query tokens offset.. of a chunk, `[n, Hq, Dk]`, over its keys `[1, H, L, D]` -> `[n, Hq, Dv]`."""
    num_tokens, query_heads, key_dim = query.shape
    position = chunk.position + offset
    seen = slice(0, position + num_tokens - chunk.first_key)
    keys, values = keys[:, :, seen], values[:, :, seen]
    key_positions = torch.arange(chunk.first_key, position + num_tokens, device=query.device)
    query_positions = torch.arange(position, position + num_tokens, device=query.device)
    distance = (key_positions - query_positions.unsqueeze(1)).unsqueeze(0)
    visible = distance <= 0
    if options.window is not None:
        visible &= distance > -options.window
    packed = query.transpose(0, 1).reshape(1, keys.shape[1], -1, num_tokens, key_dim)
    attended = _attend(packed, keys, values, visible, distance, options)
    return attended.reshape(query_heads, num_tokens, -1).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    distance: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """query `[B, H, G, n, Dk]`, keys `[B, H, L, Dk]`, values `[B, H, L, Dv]`; visible, distance `[B, n, L]`.

    Returns `[B, H, G, n, Dv]` in query's dtype.
    """
    rows, heads, group, num_tokens, _ = query.shape
    stacked = query.flatten(2, 3)
    if _is_plain(options):
        mask = visible[:, None, None].expand(rows, 1, group, num_tokens, -1).flatten(2, 3)
        attended = scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=options.scale)
        return attended.reshape(rows, heads, group, num_tokens, -1)
    scores = stacked.float() @ keys.float().transpose(2, 3) * options.scale
    scores = scores.view(rows, heads, group, num_tokens, -1)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.float().view(heads, group, 1, 1)
        scores = scores + slopes * distance[:, None, None]
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = _normalize(scores, options.sinks)
    attended = weights.flatten(2, 3) @ values.float()
    return attended.to(query.dtype).view(rows, heads, group, num_tokens, -1)


def _normalize(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of scores `[B, H, G, n, L]` over L; sinks `[Hq]` take part in the sum and are then dropped."""
    if sinks is None:
        return scores.softmax(dim=-1)
    rows, heads, group, num_tokens, _ = scores.shape
    extra = sinks.float().view(heads, group, 1, 1).expand(rows, heads, group, num_tokens, 1)
    return torch.cat((scores, extra), dim=-1).softmax(dim=-1)[..., :-1]


def _is_plain(options: AttentionOptions) -> bool:
    """Whether torch's own attention has all that is asked for."""
    return options.softcap is None and options.sinks is None and options.alibi_slopes is None
