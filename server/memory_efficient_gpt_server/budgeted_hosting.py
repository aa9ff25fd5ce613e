"""From settings to models that are loaded on demand under a budget.

Purpose: build the registry, and the catalog whose models it loads.
Does not know: HTTP, who is evicted for whom.
Invariant: torch is only imported by what estimates; weights are read by workers only; what is to be loaded
at start fits together.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.generation_defaults import generation_defaults
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.registry.hosted import HostedModel, Provision
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.sizing import compute_device, sized
from memory_efficient_gpt_server.registry.variants import HOST, ModelEntry, VariantKey, per_device
from memory_efficient_gpt_server.workers import WorkerModel

logger = logging.getLogger(__name__)


def budgeted_catalog(
    chosen: Sequence[tuple[ModelSettings, EngineConfig]],
    budget_bytes: int,
    *,
    policy: Policy,
    worker_log_level: str,
    worker_log_json: bool,
) -> ModelCatalog:
    """All models, none of them started. Raises ModelNotFoundError, CheckpointError, ConfigError."""
    folders = {model.id: resolve_model(model.model, model.revision) for model, _ in chosen}
    hosted = [
        HostedModel(
            _entry(model),
            VariantKey(
                model.id, model.quantization, model.kv_cache_dtype, model.max_model_len, model.dtype,
                model.revision,
            ),
            cache(partial(_provide, config, budget_bytes, model.id, worker_log_level, worker_log_json)),
            at_start=model.load == "start",
        )
        for model, config in chosen
    ]  # fmt: skip
    budgets = _budgets(chosen, budget_bytes)
    _require_room(hosted, budgets)
    registry = Registry(hosted, budgets, policy)
    return ModelCatalog((_served(model, folders[model.id], registry) for model, _ in chosen), registry)


def _entry(model: ModelSettings) -> ModelEntry:
    return ModelEntry(
        id=model.id,
        source=model.model,
        pinned=model.pinned,
        ttl_s=model.ttl_s,
        min_residency_s=model.min_residency_s,
        priority=model.priority,
    )


def _provide(config: EngineConfig, budget_bytes: int, name: str, log_level: str, log_json: bool) -> Provision:
    final, estimate = sized(config, budget_bytes)
    logger.info("%s would take %s bytes.", name, f"{sum(a.bytes for a in estimate.awake()):,}")
    return Provision(estimate, lambda: WorkerModel(final, name=name, log_level=log_level, log_json=log_json))


def _served(model: ModelSettings, folder: Path, registry: Registry) -> ServedModel:
    return ServedModel(
        id=model.id,
        engine=registry.engine(model.id),
        tokenizer_source=partial(Tokenizer.load, folder),
        generation_defaults=generation_defaults(folder),
        registry=registry,
        config_vocab_size=_vocab_size(folder),
    )


def _vocab_size(folder: Path) -> int:
    """Of the checkpoint. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Download the model again.") from error
    if not isinstance(size, int):
        raise CheckpointError(f"{path} names no vocab_size, without which no request can be checked.")
    return size


def _budgets(chosen: Sequence[tuple[ModelSettings, EngineConfig]], budget_bytes: int) -> dict[str, Budget]:
    """`budget_bytes` for each device that computes; the host's memory is a device of its own."""
    devices = {compute_device(config) for _, config in chosen}
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {HOST: Budget(host_bytes)} | {device: Budget(budget_bytes) for device in devices}


def _require_room(hosted: Sequence[HostedModel], budgets: dict[str, Budget]) -> None:
    """Raises ConfigError if what is to be loaded at start doesn't fit together."""
    first = [model for model in hosted if model.at_start]
    needed = per_device([amount for m in first for amount in m.provide().estimate.awake()])
    problems = [
        f"the models with load: start ({', '.join(model.id for model in first)}) take {size:,} bytes of "
        f"{device} together; memory_budget_bytes is {budgets[device].total_bytes:,}. Raise it, or set load: "
        "on_demand for some of them."
        for device, size in needed.items()
        if size > budgets[device].reservable_bytes
    ]
    if problems:
        raise ConfigError(problems)
