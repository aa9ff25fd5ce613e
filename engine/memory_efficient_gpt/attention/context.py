"""What a step tells the attention layers: where each token's keys and values live.

Purpose: carry one step's metadata from the runner to the attention function, past model code.
Does not know: models, requests, the scheduler.
Invariant: a context is set only for the duration of one forward call, in one thread.

Letters: T query tokens of the step, S sequences, MB blocks of the longest table, N blocks of the
pool, BS tokens of a block, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from memory_efficient_gpt.kv_cache.pool import LayerCache as LayerCache
from memory_efficient_gpt.native.deferred_calls import DeferredTurn


@dataclass(slots=True)
class StepContext:
    """One step's metadata; every tensor on the model's device.

    slots `[T] int64`: block * BS + offset where each query token's K/V is written (block 0 is trash).
    block_tables `[S, MB] int32`; query_starts `[S + 1] int32`: row s owns tokens
    query_starts[s]..query_starts[s+1]-1; context_lens `[S] int32`: keys visible to the last token of
    row s, this step's included. Token i of row s sits at position
    context_lens[s] - (query_starts[s+1] - query_starts[s]) + i.

    host_query_lens, host_context_lens: the same lengths, S of each, as the scheduler knows them on the host.
    A backend that must split a mixed batch reads them instead of waiting for the device.
    derived: what a backend computes from this step's metadata once and uses in every layer.
    """

    backend: AttentionBackend
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    max_context_len: int
    host_query_lens: Sequence[int] | None = None
    host_context_lens: Sequence[int] | None = None
    derived: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """One call's mathematics: softmax(softcap(scale * q k) + bias, with sinks) v, causal.

    window: a token sees itself and the window - 1 before it. sinks `[Hq]`: one extra logit a head
    that takes part in the normalisation only. alibi_slopes `[Hq] float32`: adds slope * (k_pos - q_pos).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """Paged attention on one device."""

    name: str

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext) -> None:
        """Store key `[T, Hkv, Dk]` and value `[T, Hkv, Dv]` at `context.slots`, quantizing for int8."""

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, Dk]` over the cache; returns `[T, Hq, Dv]`, query's dtype."""


@runtime_checkable
class TurningBackend(AttentionBackend, Protocol):
    """A backend that computes rotary positions along with the write."""

    def turn_and_write(
        self, turn: DeferredTurn, value: torch.Tensor, cache: LayerCache, context: StepContext
    ) -> None:
        """Fill `turn.outputs`; store its turned key and value `[T, Hkv, Dv]` as `write` would."""


_current: ContextVar[StepContext | None] = ContextVar("megpt_step_context", default=None)


@contextmanager
def step_context(context: StepContext) -> Iterator[None]:
    """Make `context` the one that attention layers see."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current_context() -> StepContext:
    """The running step's context. Raises RuntimeError outside a step (a bug of the caller)."""
    context = _current.get()
    if context is None:
        raise RuntimeError("paged attention was called outside a step: no step_context is set")
    return context
