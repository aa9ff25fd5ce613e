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
from memory_efficient_gpt.hardware import resolve_device
from memory_efficient_gpt.memory.estimation import estimate
from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.workspace import CUDA_CONTEXT_BYTES, WORKER_BYTES
from memory_efficient_gpt_server.registry.choice import Facts
from memory_efficient_gpt_server.registry.variants import HOST, Estimate

UNQUANTIZED: Final = "bf16"
"""The name of the scheme that stores weights as they are, whatever their type."""

KV_SHARE: Final = 0.25
"""Most of the budget that an automatic KV cache takes."""

_NO_LIMIT: Final = 1 << 62


def compute_device(config: EngineConfig) -> str:
    """Where the model would compute. Raises ConfigError for a device that is not there."""
    return str(resolve_device(config.device))


def sized(config: EngineConfig, budget_bytes: int) -> tuple[EngineConfig, Estimate]:
    """The config with a KV cache of fixed size, and what it takes. Raises MegptError, as loading would."""
    predicted = estimate(config, free_bytes=_NO_LIMIT)
    if config.kv_cache_bytes is None and config.num_kv_blocks is None and predicted.kv_cache_bytes:
        most = int(budget_bytes * KV_SHARE)
        config = replace(config, kv_cache_bytes=min(predicted.kv_cache_bytes, most))
        if predicted.kv_cache_bytes > most:
            predicted = estimate(config)
    return config, registry_estimate(predicted)


def registry_estimate(predicted: MemoryEstimate) -> Estimate:
    """The engine's estimate as the registry books it, with what would stay of it in a sleep.

    On another device than the host a sleeping process keeps its context; weights go to host memory. On the
    host only the KV cache is given back, and only Linux takes pages back.
    """
    if predicted.device == HOST:
        can_sleep = predicted.kv_cache_bytes > 0 and sys.platform == "linux"
        context_bytes = host_bytes = 0
    else:
        can_sleep, host_bytes = True, WORKER_BYTES
        context_bytes = min(predicted.workspace_bytes, CUDA_CONTEXT_BYTES)
    return Estimate(
        device=predicted.device,
        weights_bytes=predicted.weights_bytes,
        kv_bytes=predicted.kv_cache_bytes,
        workspace_bytes=predicted.workspace_bytes - context_bytes,
        context_bytes=context_bytes,
        host_bytes=host_bytes,
        can_sleep=can_sleep,
    )


def facts_of_config(config: EngineConfig) -> Facts:
    """How the model would be served. Raises MegptError, as loading would."""
    predicted = estimate(config, free_bytes=_NO_LIMIT)
    return Facts(predicted.quantization or UNQUANTIZED, predicted.kv_cache_dtype)
