"""What a model will take on a device, predicted in about a second.

Purpose: the estimate for a model's name, or for an architecture of which there is no folder.
Does not know: other models, budgets.
Invariant: no weight is read; what loading refuses for the folder's sake is refused here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memory_efficient_gpt.config import EngineConfig, TierName
from memory_efficient_gpt.errors import CheckpointError, ConfigError, UnsupportedModelError
from memory_efficient_gpt.hardware import free_memory_bytes, resolve_device
from memory_efficient_gpt.kv_cache.block_sizes import BlockSizes
from memory_efficient_gpt.kv_cache.geometry import LayerKV, probe_geometry, token_bytes
from memory_efficient_gpt.kv_cache.pool_size import (
    context_length,
    granule_bytes,
    kv_block_size,
    kv_dtype,
    moving_obstacle,
    num_pool_blocks,
    pool_context,
)
from memory_efficient_gpt.loading import (
    bundled_models,
    check_checkpoint,
    load_config,
    quantization_notes,
    quantization_settings,
    resolve_dtype,
    resolve_model,
)
from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.weight_figures import Source, weight_figures
from memory_efficient_gpt.memory.weights import Architecture, build_architecture
from memory_efficient_gpt.memory.workspace import process_bytes, workspace_bytes
from memory_efficient_gpt.tiers import TierDecision, decide_tier

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def estimate(config: EngineConfig, *, free_bytes: int | None = None) -> MemoryEstimate:
    """What the model will take once it is loaded as `config` says.

    free_bytes: what will be free on the device before it is loaded, by which an automatic KV cache is sized;
    None asks the device. Of a hub id only descriptions are downloaded.
    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError or ConfigError, as loading would.
    """
    device = resolve_device(config.device)
    folder = resolve_model(config.model, config.revision, weights=False)
    files, notes = _weight_files(config.model, folder)
    notes = (*notes, *quantization_notes(folder))
    source = Source(quantization_settings(folder), files)
    return _estimate(load_config(folder), config, device, free_bytes, source, notes)


def estimate_config(
    model_config: PreTrainedConfig,
    config: EngineConfig,
    *,
    device: torch.device,
    free_bytes: int | None = None,
) -> MemoryEstimate:
    """The same for an architecture with float weights. With `free_bytes`, `device` need not be there."""
    return _estimate(model_config, config, device, free_bytes, Source(), ())


def _estimate(
    model_config: PreTrainedConfig,
    config: EngineConfig,
    device: torch.device,
    free_bytes: int | None,
    source: Source,
    notes: tuple[str, ...],
) -> MemoryEstimate:
    decision = _tier(model_config, config)
    dtype, dtype_notes = resolve_dtype(config.dtype, model_config, device)
    architecture = build_architecture(model_config, dtype)
    max_len, length_notes = context_length(config, model_config, decision.max_model_len)
    workspace = _workspace(model_config, config, architecture, decision, device, max_len)
    weights = weight_figures(architecture, source, config, device, packed=decision.tier == "B")
    free = free_memory_bytes(device) if free_bytes is None else free_bytes
    free -= weights.taken_from_free + process_bytes(device)
    pool = _pool(config, decision, dtype, device, max_len, free)
    return MemoryEstimate(
        weights_bytes=weights.num_bytes, kv_cache_bytes=pool.num_bytes, workspace_bytes=workspace,
        load_peak_bytes=max(weights.peak_bytes, weights.num_bytes), device=str(device), tier=decision.tier,
        dtype=_name(dtype), kv_cache_dtype=_name(pool.dtype) if pool.dtype else "transformers",
        max_model_len=pool.max_len, wanted_model_len=max_len, quantization=weights.quantization,
        kv_context_bytes=pool.context_bytes, kv_can_move=pool.movable,
        notes=(*notes, *dtype_notes, *weights.notes, *decision.notes, *length_notes, *pool.notes),
    )  # fmt: skip


def _workspace(
    model_config: PreTrainedConfig,
    config: EngineConfig,
    architecture: Architecture,
    decision: TierDecision,
    device: torch.device,
    max_len: int,
) -> int:
    """Of steps as the tier takes them; tier C computes one whole sequence, in a cache of transformers'."""
    packed = decision.tier == "B"
    num_bytes = workspace_bytes(
        architecture.layers, dtype=architecture.dtype, device=device,
        num_experts_per_token=int(getattr(model_config, "num_experts_per_tok", None) or 1),
        step_tokens=config.max_batched_tokens if packed else max_len,
        num_seqs=config.max_num_seqs if packed else 1,
    )  # fmt: skip
    return num_bytes if packed else num_bytes + _own_cache_bytes(model_config, max_len, architecture.dtype)


@dataclass(frozen=True, slots=True)
class _Described:
    """A config, equal to those of the same content."""

    text: str
    config: PreTrainedConfig = field(compare=False)


def _tier(model_config: PreTrainedConfig, config: EngineConfig) -> TierDecision:
    """The tier by a probe, which takes most of an estimate's time and is remembered for the next one."""
    text = f"{type(model_config).__name__} {model_config.to_json_string()}"
    decision = _probe_once(_Described(text, model_config), config.tier)
    limit = decision.max_model_len
    if limit is not None and config.max_model_len is not None and config.max_model_len > limit:
        return decide_tier(
            model_config, forced=config.tier, max_model_len=config.max_model_len, remembers=True
        )
    return decision


@functools.lru_cache(maxsize=64)
def _probe_once(described: _Described, forced: TierName | None) -> TierDecision:
    return decide_tier(described.config, forced=forced, remembers=True)


@dataclass(frozen=True, slots=True)
class _Pool:
    """The KV cache; tier C has none of ours."""

    max_len: int
    num_bytes: int = 0
    dtype: torch.dtype | None = None
    context_bytes: int = 0
    movable: bool = False
    notes: tuple[str, ...] = ()


def _pool(
    config: EngineConfig,
    decision: TierDecision,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    free: int,
) -> _Pool:
    """As loading would make it; where that fails for want of memory, one that holds a single request."""
    layers = decision.layers
    if decision.tier == "C" or layers is None:
        return _Pool(max_len)
    kv, size = kv_dtype(config, dtype, device), kv_block_size(config, device)
    movable = moving_obstacle(config, layers, size, kv, device, granule_bytes(device)) is None
    granule = granule_bytes(device) if movable and config.kv_reserve_bytes is not None else 1
    sizes = BlockSizes(layers, size, kv)
    full = sizes.bytes_of(math.ceil(max_len / size) + 1, granule)
    try:
        blocks = num_pool_blocks(config, layers, size, kv, device, max_len, free, granule)
    except ConfigError:
        if config.kv_cache_bytes is not None:
            raise
        note = f"free memory leaves no room for a KV cache; counted is one for {max_len:,} tokens"
        return _Pool(max_len, full, kv, full, movable, (note,))
    held, notes = pool_context(blocks, size, max_len)
    return _Pool(held, sizes.bytes_of(blocks, granule), kv, full, movable, notes)


def _weight_files(model: str, folder: Path) -> tuple[Sequence[Path] | None, tuple[str, ...]]:
    """The checked weight files; None for a hub id whose weights are not here."""
    try:
        return check_checkpoint(folder), ()
    except CheckpointError:
        if model in bundled_models() or Path(model).expanduser().is_dir():
            raise
        return None, ("its weights are not downloaded yet: sizes are those that config.json says",)


def _own_cache_bytes(model_config: PreTrainedConfig, max_len: int, dtype: torch.dtype) -> int:
    """transformers' own cache of one sequence; heads are not shared where the geometry can't be found."""
    try:
        layers: Sequence[LayerKV] = probe_geometry(model_config)
        return max_len * token_bytes(layers, dtype.itemsize)
    except UnsupportedModelError:
        found = [getattr(model_config, name, None) for name in ("num_hidden_layers", "hidden_size")]
        num_layers, width = (value if isinstance(value, int) else 0 for value in found)
        return 2 * num_layers * width * max_len * dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return "fp8" if dtype is torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
