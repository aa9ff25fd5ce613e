"""How many bytes a model will take under a budget, before it is loaded.

Purpose: the engine's own estimate as the registry's, and a KV cache that leaves room for other models.
Does not know: what else is loaded.
Invariant: the config that comes back sizes its KV cache as the estimate says, whatever is free at the load.

The estimate is computed in this process, with torch, which takes about a second for each model and some more
for the first.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Final

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.hardware import resolve_device
from memory_efficient_gpt.memory.estimation import estimate
from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.workspace import CUDA_CONTEXT_BYTES, WORKER_BYTES
from memory_efficient_gpt_server.registry.choice import Facts
from memory_efficient_gpt_server.registry.variants import HOST, NO_LIMITS, Estimate, KvLimits

UNQUANTIZED: Final = "bf16"
"""The name of the scheme that stores weights as they are, whatever their type."""

KV_SHARE: Final = 0.25
"""Most of the budget that an automatic KV cache begins with."""

_NO_LIMIT: Final = 1 << 62


def compute_device(config: EngineConfig) -> str:
    """Where the model would compute. Raises ConfigError for a device that is not there."""
    return str(resolve_device(config.device))


def sized(
    config: EngineConfig, budget_bytes: int, limits: KvLimits = NO_LIMITS
) -> tuple[EngineConfig, Estimate]:
    """The config with a KV cache of known size and room to grow, and what it takes at first.

    An automatic cache begins with its soft limit, or its share of the budget; it may grow to what
    `max_num_seqs` requests of full length fill, within its hard limit and the budget. One of a given size
    grows only if there is a hard limit. Raises MegptError, as loading would.
    """
    config = replace(config, kv_reserve_bytes=budget_bytes)  # its memory comes as that of one that grows
    predicted = estimate(config, free_bytes=_NO_LIMIT)
    most = min(limits.hard_bytes or budget_bytes, budget_bytes)
    automatic = config.kv_cache_bytes is None and config.num_kv_blocks is None
    if automatic and predicted.kv_cache_bytes:
        most = min(most, predicted.kv_cache_bytes)
        first = min(_first_bytes(predicted, budget_bytes, limits.soft_bytes), most)
        config = replace(config, kv_cache_bytes=first)
        if predicted.kv_cache_bytes > first:
            predicted = _with_first_cache(config, limits)
    elif limits.hard_bytes is None:
        most = predicted.kv_cache_bytes
    if limits.hard_bytes is not None and predicted.kv_cache_bytes > limits.hard_bytes:
        raise ConfigError(
            [f"the KV cache of {config.model} begins with {predicted.kv_cache_bytes:,} bytes; its "
             f"kv_hard_limit_bytes is {limits.hard_bytes:,}. Raise that, or make the cache smaller."]
        )  # fmt: skip
    most = max(most, predicted.kv_cache_bytes)
    if predicted.kv_can_move:
        _check_soft_limit(config, limits, budget_bytes if automatic else min(most, budget_bytes))
    config = replace(config, kv_reserve_bytes=most or None)
    return config, registry_estimate(predicted, most)


def _check_soft_limit(config: EngineConfig, limits: KvLimits, most_bytes: int) -> None:
    """Raises ConfigError if the cache can never have as much as it is to keep."""
    if limits.soft_bytes is not None and limits.soft_bytes > most_bytes:
        raise ConfigError(
            [f"kv_soft_limit_bytes of {config.model} is {limits.soft_bytes:,}, but its KV cache may have "
             f"{most_bytes:,} at most. Lower it, or raise memory_budget_bytes or kv_hard_limit_bytes."]
        )  # fmt: skip


def _with_first_cache(config: EngineConfig, limits: KvLimits) -> MemoryEstimate:
    """What it takes with the cache that it begins with.

    Raises MegptError, naming the limit that made the cache small.
    """
    try:
        return estimate(config, free_bytes=_NO_LIMIT)  # asking a GPU would take memory there
    except ConfigError as error:
        if config.kv_cache_bytes != limits.hard_bytes:
            raise
        named = [problem.replace("kv_cache_bytes", "kv_hard_limit_bytes") for problem in error.problems]
        raise ConfigError(named) from error


def registry_estimate(predicted: MemoryEstimate, kv_most_bytes: int) -> Estimate:
    """The engine's estimate as the registry books it, with what would stay of it in a sleep.

    On another device than the host a sleeping process keeps its context; weights go to host memory. On the
    host only the KV cache is given back, and only Linux takes pages back. kv_most_bytes: what the KV cache
    may grow to, where it can.
    """
    if predicted.device == HOST:
        can_sleep = predicted.kv_cache_bytes > 0 and sys.platform == "linux"
        context_bytes = host_bytes = 0
    else:
        can_sleep, host_bytes = True, WORKER_BYTES
        context_bytes = min(predicted.workspace_bytes, CUDA_CONTEXT_BYTES)
    moves = predicted.kv_can_move
    return Estimate(
        device=predicted.device,
        weights_bytes=predicted.weights_bytes,
        kv_bytes=predicted.kv_cache_bytes,
        workspace_bytes=predicted.workspace_bytes - context_bytes,
        context_bytes=context_bytes,
        host_bytes=host_bytes,
        can_sleep=can_sleep,
        kv_least_bytes=min(predicted.kv_context_bytes, predicted.kv_cache_bytes) if moves else None,
        kv_most_bytes=kv_most_bytes if moves else None,
    )


def facts_of_config(config: EngineConfig) -> Facts:
    """How the model would be served. Raises MegptError, as loading would."""
    predicted = estimate(config, free_bytes=_NO_LIMIT)
    return Facts(predicted.quantization or UNQUANTIZED, predicted.kv_cache_dtype)


def _first_bytes(predicted: MemoryEstimate, budget_bytes: int, soft_bytes: int | None) -> int:
    """Of an automatic cache. A small soft limit does not shorten requests more than the share would."""
    share = min(predicted.kv_cache_bytes, int(budget_bytes * KV_SHARE))
    return share if soft_bytes is None else max(soft_bytes, min(predicted.kv_context_bytes, share))
