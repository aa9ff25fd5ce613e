"""How large the KV pool of a model becomes.

Purpose: from settings and a model's geometry to the pool's dtype, context length and number of blocks.
Does not know: which memory is meant by "free", models' weights; it allocates nothing and asks no GPU.
Invariant: loading a model and predicting what it will take ask these functions, so that both agree.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.config import BLOCK_SIZE_CPU, BLOCK_SIZE_CUDA, EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.kv_cache.block_sizes import BlockSizes
from memory_efficient_gpt.kv_cache.geometry import LayerKV

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNKNOWN_CONTEXT_LENGTH: Final = 4096
CPU_POOL_SHARE: Final = 0.3
CUDA_POOL_SHARE: Final = 0.9
CUDA_GRANULE_BYTES: Final = 2 << 20
"""Of memory that moves on GPUs, in each tensor. The driver's own figure holds once a model is loaded."""


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
    granule: int = 1,
) -> int:
    """Blocks of the pool, the trash block included. free_bytes: what is free on `device` beside the weights.

    granule: of the pool's memory; a size in bytes is filled with whole ones. Raises ConfigError where
    there is no room for two.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks + 1
    sizes = BlockSizes(layers, block_size, dtype)
    two = sizes.bytes_of(2, granule)
    if config.kv_cache_bytes is not None:
        blocks = sizes.blocks_within(config.kv_cache_bytes, granule)
        if blocks < 2:
            raise ConfigError([f"kv_cache_bytes is {config.kv_cache_bytes:,}; two blocks take {two:,}."])
        return blocks
    share = CPU_POOL_SHARE if device.type == "cpu" else CUDA_POOL_SHARE
    room = sizes.blocks_within(int(free_bytes * share), granule)
    wanted = config.max_num_seqs * math.ceil(max_len / block_size) + 1
    if room < 2:
        raise ConfigError(
            [f"no memory for a KV cache: {free_bytes:,} bytes are free on {device}, "
             f"two blocks take {two:,}."]
        )  # fmt: skip
    return min(wanted, room)


def num_reserved_blocks(
    config: EngineConfig,
    layers: Sequence[LayerKV],
    block_size: int,
    dtype: torch.dtype,
    num_blocks: int,
    granule: int = 1,
) -> int:
    """Blocks that the pool of `num_blocks` can grow to, the trash block included."""
    sizes = BlockSizes(layers, block_size, dtype)
    return max(num_blocks, sizes.blocks_within(config.kv_reserve_bytes or 0, granule))


def granule_bytes(device: torch.device) -> int:
    """Of memory that moves on `device`, as it is before a driver is asked."""
    return CUDA_GRANULE_BYTES if device.type == "cuda" else 1


def moving_obstacle(
    config: EngineConfig,
    layers: Sequence[LayerKV],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    granule: int,
) -> str | None:
    """Why a pool on `device` can't give memory back and take it again, or None, as far as settings tell."""
    if sys.platform != "linux":
        return f"memory is not moved on {sys.platform}"
    if device.type == "cuda" and not _has_cuda_bindings():
        return "the package cuda-bindings is not installed"
    least = BlockSizes(layers, block_size, dtype).bytes_of(2, granule)
    if config.kv_cache_bytes is not None and config.num_kv_blocks is None and config.kv_cache_bytes < least:
        return f"its {config.kv_cache_bytes:,} bytes are less than the {least:,} that move at a time"
    return None


def _has_cuda_bindings() -> bool:
    """Whether they can be imported, without doing it: that would load the driver's library."""
    try:
        return importlib.util.find_spec("cuda.bindings.driver") is not None
    except ImportError:
        return False


def pool_context(num_blocks: int, block_size: int, max_len: int) -> tuple[int, tuple[str, ...]]:
    """Positions that the pool can hold of the `max_len` wanted, and a note if that is less."""
    held = (num_blocks - 1) * block_size
    if held >= max_len:
        return max_len, ()
    return held, (f"context limited to {held} tokens by the KV pool of {num_blocks} blocks",)
