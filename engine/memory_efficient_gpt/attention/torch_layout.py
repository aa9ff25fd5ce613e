"""How the torch backend splits one step: batches of single-token rows, and prompt chunks.

Purpose: from a step's metadata to the pages to gather and the keys that each query may see.
Does not know: queries, keys, values, how attention is computed.
Invariant: computed once a step for each window and cache geometry; every row sees at least one key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.attention.context import LayerCache, StepContext

MAX_GATHERED: Final = 1 << 26
"""Numbers gathered from the cache at once for a batch of rows: 128 MiB in bfloat16."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """R rows with one query token each; L gathered keys a row.

    tokens `[R] int64`: where the rows' queries are among the step's tokens; None when they are all of them,
    in order. slots `[R, L] int64`: block * BS + offset of each key. visible `[R, L] bool`. distance
    `[R, L] int64`: key's position minus the query's. Where a row has fewer keys, `slots` repeats its last
    one: what others left in the cache may be NaN, which no attention weight of 0 would take away.
    """

    tokens: torch.Tensor | None
    slots: torch.Tensor
    visible: torch.Tensor
    distance: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive query tokens of one row: step tokens start..start+num_tokens-1, the first at `position`.

    slots `[1, L] int64`: block * BS + offset of the keys of positions first_key..position + num_tokens - 1.
    """

    start: int
    num_tokens: int
    position: int
    first_key: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's rows with one query token, in batches, and its longer chunks."""

    batches: tuple[RowBatch, ...]
    chunks: tuple[Chunk, ...]

    @property
    def single(self) -> RowBatch | None:
        """The batch that is the whole step, if there is one."""
        return self.batches[0] if len(self.batches) == 1 and self.batches[0].tokens is None else None


def step_layout(context: StepContext, cache: LayerCache, window: int | None, num_tokens: int) -> StepLayout:
    """The layout of a step of `num_tokens` query tokens for a layer like `cache`'s.

    Waits for the device only in a mixed step whose context has no host lengths.
    """
    block_size = cache.key.shape[1]
    key_numbers = cache.key.shape[2] * (cache.key.shape[3] + cache.value.shape[3])
    name = ("torch", window, block_size, key_numbers)
    layout: StepLayout | None = context.derived.get(name)
    if layout is None:
        layout = _Planner(context, block_size, key_numbers, window, num_tokens).layout()
        context.derived[name] = layout
    return layout


class _Planner:
    def __init__(
        self, context: StepContext, block_size: int, key_numbers: int, window: int | None, num_tokens: int
    ) -> None:
        self._context = context
        self._block_size = block_size
        self._key_numbers = key_numbers
        self._window = window
        self._num_tokens = num_tokens
        self._device = context.block_tables.device

    def layout(self) -> StepLayout:
        context = self._context
        num_rows = context.block_tables.shape[0]
        if context.max_query_len == 1 and self._num_tokens == num_rows:
            return StepLayout(tuple(self._batches(range(num_rows), range(num_rows))), ())
        rows, tokens, chunks = [], [], []
        start = 0
        query_lens = _on_host(context.host_query_lens, context.query_starts.diff())
        context_lens = _on_host(context.host_context_lens, context.context_lens)
        for row, (length, num_keys) in enumerate(zip(query_lens, context_lens, strict=True)):
            if length == 1:
                rows.append(row)
                tokens.append(start)
            elif length > 1:
                chunks.append(self._chunk(row, start, length, num_keys))
            start += length
        return StepLayout(tuple(self._batches(rows, tokens)), tuple(chunks))

    def _chunk(self, row: int, start: int, length: int, num_keys: int) -> Chunk:
        position = num_keys - length
        first_key = 0 if self._window is None else max(0, position - self._window + 1)
        positions = torch.arange(first_key, num_keys, device=self._device)
        blocks = self._context.block_tables[row].long()[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        return Chunk(start, length, position, first_key, slots.unsqueeze(0))

    def _batches(self, rows: Sequence[int], tokens: Sequence[int]) -> list[RowBatch]:
        """Rows of like lengths together, each batch within the gathering limit."""
        whole = len(rows) == self._num_tokens
        batches = []
        for members in self._groups(rows):
            longest = self._longest([rows[m] for m in members])
            size = max(1, MAX_GATHERED // (self._num_keys(longest) * self._key_numbers))
            for at in range(0, len(members), size):
                part = members[at : at + size]
                if whole and len(part) == len(rows):
                    batches.append(self._batch(None, None, longest))
                else:
                    batches.append(self._batch([rows[m] for m in part], [tokens[m] for m in part], longest))
        return batches

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Split rows by the power of two of their length, if padding would otherwise double the work."""
        lengths = self._host_context_lens()
        everyone = list(range(len(rows)))
        if not rows or lengths is None:
            return [everyone] if rows else []
        keys = [self._num_keys(lengths[row]) for row in rows]
        if len(rows) * max(keys) <= 2 * sum(keys):
            return [everyone]
        groups: dict[int, list[int]] = {}
        for member in everyone:
            groups.setdefault((keys[member] - 1).bit_length(), []).append(member)
        return list(groups.values())

    def _longest(self, rows: Sequence[int]) -> int:
        lengths = self._host_context_lens()
        longest = self._context.max_context_len if lengths is None else max(lengths[row] for row in rows)
        return max(1, longest)

    def _host_context_lens(self) -> Sequence[int] | None:
        lengths = self._context.host_context_lens
        if lengths is None and self._device.type == "cpu":
            return _on_host(None, self._context.context_lens)
        return lengths

    def _num_keys(self, context_len: int) -> int:
        """Keys to gather for one query token."""
        return max(1, context_len if self._window is None else min(context_len, self._window))

    def _batch(self, rows: list[int] | None, tokens: list[int] | None, longest: int) -> RowBatch:
        tables, lengths = self._context.block_tables, self._context.context_lens
        token_index = None
        if rows is not None:
            row_index = torch.tensor(rows).to(self._device, non_blocking=True)
            token_index = torch.tensor(tokens).to(self._device, non_blocking=True)
            tables, lengths = tables.index_select(0, row_index), lengths.index_select(0, row_index)
        lengths = lengths.long().clamp(min=1).unsqueeze(1)
        num_keys = self._num_keys(longest)
        first = torch.zeros_like(lengths) if self._window is None else (lengths - num_keys).clamp(min=0)
        positions = first + torch.arange(num_keys, device=self._device)
        visible = positions < lengths
        positions = positions.minimum(lengths - 1)
        blocks = tables.long().gather(1, positions // self._block_size)
        slots = blocks * self._block_size + positions % self._block_size
        return RowBatch(token_index, slots, visible, positions - (lengths - 1))


def _on_host(known: Sequence[int] | None, tensor: torch.Tensor) -> Sequence[int]:
    return tensor.tolist() if known is None else known
