"""A forward pass over a few tokens of a model that is prepared for packed steps.

Purpose: show what the model's layers get, before there is a KV pool.
Does not know: what is looked for.
Invariant: the model is left without the pool that the pass used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.attention.context import (
    AttentionBackend,
    AttentionOptions,
    LayerCache,
    StepContext,
    TurningBackend,
)
from memory_efficient_gpt.attention.interface import CACHE_ATTRIBUTE, forward_packed
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.native.deferred_calls import DeferredTurn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS: Final = 5
_BLOCK_SIZE: Final = 8


class WritesOnly:
    """A backend's writes with torch's attention: small blocks need no attention kernel of their own then."""

    name = "writes only"

    def __init__(self, backend: TurningBackend) -> None:
        self._backend = backend
        self._torch = TorchBackend()

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext) -> None:
        """As the backend."""
        self._backend.write(key, value, cache, context)

    def turn_and_write(
        self, turn: DeferredTurn, value: torch.Tensor, cache: LayerCache, context: StepContext
    ) -> None:
        """As the backend."""
        self._backend.turn_and_write(turn, value, cache, context)

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> torch.Tensor:
        """As torch."""
        return self._torch.attend(query, cache, context, options)


def packed_logits(
    model: PreTrainedModel,
    layers: Sequence[LayerKV],
    device: torch.device,
    backend: AttentionBackend | None = None,
    kv_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Logits `[5, V]` of a sequence of five tokens, by torch's attention. Raises what the model raises.

    backend: None for torch's; kv_dtype: None for the model's.
    """
    pool = KVPool(layers, 2, _BLOCK_SIZE, kv_dtype or model.dtype, device)
    places = torch.arange(_TOKENS, device=device)
    context = StepContext(
        backend=backend or TorchBackend(),
        slots=places + _BLOCK_SIZE,
        block_tables=torch.ones((1, 1), dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, _TOKENS], dtype=torch.int32, device=device),
        context_lens=torch.tensor([_TOKENS], dtype=torch.int32, device=device),
        max_query_len=_TOKENS,
        max_context_len=_TOKENS,
        host_query_lens=[_TOKENS],
        host_context_lens=[_TOKENS],
    )
    pool.attach(model)
    try:
        return forward_packed(model, places + 1, places, context, places)
    finally:
        for layer in layers:
            vars(model.get_submodule(layer.module)).pop(CACHE_ATTRIBUTE, None)
