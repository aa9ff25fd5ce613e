"""How large the KV pool of a model becomes.

Purpose: from settings and a model's geometry to the pool's dtype, context length and number of blocks.
Does not know: which memory is meant by "free", models' weights; it allocates nothing.
Invariant: loading a model and predicting what it will take ask these functions, so that both agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.config import BLOCK_SIZE_CPU, BLOCK_SIZE_CUDA, EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import block_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNKNOWN_CONTEXT_LENGTH: Final = 4096
CPU_POOL_SHARE: Final = 0.3
CUDA_POOL_SHARE: Final = 0.9


def kv_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the pool, for a model that computes in `dtype`. Raises ConfigError for one the device lacks."""
    if config.kv_cache_dtype in ("float16", "fp8") and device.type == "cpu":
        raise ConfigError(
            [f"kv_cache_dtype {config.kv_cache_dtype} is for CUDA; "
             "on a CPU use auto, bfloat16, float32 or int8."]
        )  # fmt: skip
    if config.kv_cache_dtype == "fp8":
        return torch.float8_e4m3fn
    found: torch.dtype = dtype if config.kv_cache_dtype == "auto" else getattr(torch, config.kv_cache_dtype)
    return found


def kv_block_size(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a block."""
    return config.block_size or (BLOCK_SIZE_CPU if device.type == "cpu" else BLOCK_SIZE_CUDA)


def context_length(
    config: EngineConfig, model_config: PreTrainedConfig, tier_limit: int | None
) -> tuple[int, tuple[str, ...]]:
    """Positions of a request, and what a user should know of the choice. tier_limit: the tier's, if any.

    Raises ConfigError for more than the model has.
    """
    text_config = model_config.get_text_config()
    own = next(
        (
            int(value)
            for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
            if isinstance(value := getattr(text_config, name, None), int) and value > 0
        ),
        None,
    )
    limits = [limit for limit in (own, tier_limit) if limit is not None]
    limit = min(limits) if limits else None
    if config.max_model_len is None:
        if limit is None:
            note = f"the config names no context length; {UNKNOWN_CONTEXT_LENGTH} is used"
            return UNKNOWN_CONTEXT_LENGTH, (note,)
        return limit, ()
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            [f"max_model_len is {config.max_model_len:,}; this model's limit is {limit:,}. Lower it."]
        )
    return config.max_model_len, ()


def num_pool_blocks(
    config: EngineConfig,
    layers: Sequence[LayerKV],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    free_bytes: int,
) -> int:
    """Blocks of the pool, the trash block included. free_bytes: what is free on `device` beside the weights.

    Raises ConfigError where there is no room for two.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks + 1
    one = block_bytes(layers, block_size, dtype)
    if config.kv_cache_bytes is not None:
        blocks = config.kv_cache_bytes // one
        if blocks < 2:
            raise ConfigError([f"kv_cache_bytes is {config.kv_cache_bytes:,}; two blocks take {2 * one:,}."])
        return blocks
    share = CPU_POOL_SHARE if device.type == "cpu" else CUDA_POOL_SHARE
    room = int(free_bytes * share) // one
    wanted = config.max_num_seqs * math.ceil(max_len / block_size) + 1
    if room < 2:
        raise ConfigError(
            [f"no memory for a KV cache: {free_bytes:,} bytes are free on {device}, "
             f"two blocks take {2 * one:,}."]
        )  # fmt: skip
    return min(wanted, room)


def num_reserved_blocks(
    config: EngineConfig, layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype, num_blocks: int
) -> int:
    """Blocks that the pool of `num_blocks` can grow to, the trash block included."""
    one = block_bytes(layers, block_size, dtype)
    return max(num_blocks, (config.kv_reserve_bytes or 0) // one)


def pool_context(num_blocks: int, block_size: int, max_len: int) -> tuple[int, tuple[str, ...]]:
    """Positions that the pool can hold of the `max_len` wanted, and a note if that is less."""
    held = (num_blocks - 1) * block_size
    if held >= max_len:
        return max_len, ()
    return held, (f"context limited to {held} tokens by the KV pool of {num_blocks} blocks",)
