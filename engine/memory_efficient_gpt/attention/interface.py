"""The bridge between transformers' models and the paged cache: the forward call and the attention call.

Purpose: one attention function, registered by name, for every model that transformers can dispatch, and
the one way in which both the tier probe and the runner call a model.
Does not know: architectures, block tables, which backend computes.
Invariant: no host synchronization; each attention module has its own `paged_kv` (a LayerCache).

No mask function is registered under the name, so transformers builds no mask at all: what a token may see
is decided by the step's metadata alone. The tier probe proves for each architecture that this is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import torch

from memory_efficient_gpt.attention.context import (
    AttentionOptions,
    LayerCache,
    StepContext,
    TurningBackend,
    current_context,
    step_context,
)
from memory_efficient_gpt.kv_cache.geometry import call_window, require_plain_causal
from memory_efficient_gpt.native.deferral import current_deferral
from memory_efficient_gpt.native.deferred_calls import DeferredTurn

ATTENTION_NAME: Final = "memory_efficient_gpt"
CACHE_ATTRIBUTE: Final = "paged_kv"


def register() -> str:
    """Make the attention function known to transformers; returns its name. Again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    return ATTENTION_NAME


def forward_packed(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    context: StepContext,
    logits_rows: torch.Tensor,
) -> torch.Tensor:
    """One forward pass over a step's tokens, packed into a single row.

    `model` must have gone through `model_setup.prepare_model` and have its caches attached.
    input_ids, positions `[T] int64`; logits_rows `[R] int64`: the tokens (0..T-1, any order) whose logits are
    wanted; where the model allows it, its language-model head runs on these only. Returns logits `[R, V]`
    in the model's dtype. Writes the caches of all layers.
    """
    narrow = _selects_rows(type(model).forward)
    selection = {"logits_to_keep": logits_rows} if narrow else {}
    ids, position_ids = input_ids.unsqueeze(0), positions.unsqueeze(0)
    with step_context(context):
        output = model(input_ids=ids, position_ids=position_ids, use_cache=False, **selection)
    logits: torch.Tensor = output.logits[0]
    return logits if narrow else logits.index_select(0, logits_rows)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values, then attend over all cached ones.

    query `[1, Hq, T, Dk]`, key `[1, Hkv, T, Dk]`, value `[1, Hkv, T, Dv]`: the step's T tokens of all its
    sequences in a row, rotated, heads not repeated. Returns (`[1, T, Hq, Dv]` in query's dtype, None).
    `attention_mask` is not read: see the module's docstring. The module's cache is changed in place.
    """
    if query.shape[0] != 1:
        raise RuntimeError(f"paged attention takes one packed row of tokens, got a batch of {query.shape[0]}")
    layer_cache = getattr(module, CACHE_ATTRIBUTE, None)
    if not isinstance(layer_cache, LayerCache):
        raise RuntimeError(f"{type(module).__name__} has no {CACHE_ATTRIBUTE}: its cache was never attached")
    context = current_context()
    options = resolve_options(module, query.shape[3], kwargs)
    _write(query, key, value, layer_cache, context)
    output = context.backend.attend(query[0].transpose(0, 1), layer_cache, context, options)
    return output.unsqueeze(0), None


def _write(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext
) -> None:
    """Store keys and values; where query and key wait to be turned, that too."""
    deferral = current_deferral()
    if deferral is not None and isinstance(context.backend, TurningBackend):
        turn = deferral.take(DeferredTurn, query, key)
        if turn is not None:
            context.backend.turn_and_write(turn, value[0].transpose(0, 1), cache, context)
            return
    context.backend.write(key[0].transpose(0, 1), value[0].transpose(0, 1), cache, context)


def resolve_options(module: torch.nn.Module, key_dim: int, kwargs: Mapping[str, Any]) -> AttentionOptions:
    """What one call asks for, from its keyword arguments, its module and the config, in this order.

    Raises UnsupportedModelError for what paged attention cannot compute.
    """
    require_plain_causal(module, kwargs)
    scale = kwargs.get("scaling")
    softcap = kwargs.get("softcap")
    return AttentionOptions(
        scale=float(scale) if scale is not None else key_dim**-0.5,
        window=call_window(module, kwargs),
        softcap=float(softcap) if softcap else None,
        sinks=kwargs.get("s_aux"),
        alibi_slopes=kwargs.get("alibi_slopes"),
    )


@cache
def _selects_rows(forward: Callable[..., object]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
