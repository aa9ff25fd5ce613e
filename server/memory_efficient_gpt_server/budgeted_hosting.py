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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, cast

from memory_efficient_gpt.config import EngineConfig, KVCacheDtype
from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.loading import quantization_settings, resolve_model
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.cpus import num_usable_cpus
from memory_efficient_gpt_server.generation_defaults import generation_defaults
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.hosted import HostedModel, Provision
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.sizing import (
    UNQUANTIZED,
    compute_device,
    facts_of_config,
    sized,
)
from memory_efficient_gpt_server.registry.variants import (
    HOST,
    KvLimits,
    ModelEntry,
    VariantKey,
    per_device,
)
from memory_efficient_gpt_server.supervision import WorkerLimits
from memory_efficient_gpt_server.workers import WorkerModel

logger = logging.getLogger(__name__)

MOST_PROVISIONS: Final = 256
"""Of a model, with the limits of its KV cache: clients choose variants, and limits may change."""


def budgeted_catalog(
    chosen: Sequence[tuple[ModelSettings, EngineConfig]],
    budget_bytes: int,
    *,
    host_budget_bytes: int | None,
    limits: WorkerLimits,
    policy: Policy,
    worker_log_level: str,
    worker_log_json: bool,
) -> ModelCatalog:
    """All models, none of them started. Raises ModelNotFoundError, CheckpointError, ConfigError."""
    worker = partial(WorkerModel, log_level=worker_log_level, log_json=worker_log_json, limits=limits)
    folders = {model.id: resolve_model(model.model, model.revision) for model, _ in chosen}
    hosted = [_hosted(model, config, folders[model.id], budget_bytes, worker) for model, config in chosen]
    _require_choosable(hosted)
    budgets = _budgets(chosen, budget_bytes, host_budget_bytes)
    _require_room(hosted, budgets)
    registry = Registry(hosted, budgets, policy)
    served = [_served(model, folders[model.id])(registry) for model, _ in chosen]
    return ModelCatalog(served, registry, BudgetedMaker(len(chosen), worker))


@dataclass(frozen=True, slots=True)
class BudgetedMaker:
    """Makes models that come while the server runs: a ModelMaker.

    num_models: those that share the CPU threads from the start; later ones get about as many each.
    worker: makes one, not started, of a config and a name.
    """

    num_models: int
    worker: Callable[..., WorkerModel]

    def make(
        self, model: ModelSettings, budgets: Mapping[str, int]
    ) -> tuple[HostedModel, Callable[[Registry], ServedModel]]:
        """See ModelMaker."""
        folder = resolve_model(model.model, model.revision)
        served, config = _served(model, folder), model.engine_config()
        device = compute_device(config)
        if device not in budgets:
            raise ConfigError(
                [f"device {device} has no memory budget; those with one: {', '.join(budgets)}."]
            )
        if config.num_threads is None:
            share = max(1, num_usable_cpus() // (self.num_models + 1))
            config = replace(config, num_threads=share)
        hosted = _hosted(model, config, folder, budgets[device], self.worker)
        _require_choosable([hosted])
        return hosted, served


def _hosted(
    model: ModelSettings,
    config: EngineConfig,
    folder: Path,
    budget_bytes: int,
    worker: Callable[..., WorkerModel],
) -> HostedModel:
    return HostedModel(
        _entry(model),
        VariantKey(model.id),
        lru_cache(MOST_PROVISIONS)(partial(_provide, config, folder, budget_bytes, worker)),
        at_start=model.load == "start",
        choices=_choices(model, folder),
    )


def _entry(model: ModelSettings) -> ModelEntry:
    return ModelEntry(
        id=model.id,
        source=model.model,
        aliases=model.aliases,
        pinned=model.pinned,
        ttl_s=model.ttl_s,
        min_residency_s=model.min_residency_s,
        priority=model.priority,
        kv_soft_limit_bytes=model.kv_soft_limit_bytes,
        kv_hard_limit_bytes=model.kv_hard_limit_bytes,
    )


def _choices(model: ModelSettings, folder: Path) -> Choices:
    fixed = quantization_settings(folder) is not None
    if model.variants == "any":
        return Choices(any=True, weights_fixed=fixed)
    listed = [VariantKey(model.id, v.quantization, v.kv_cache_dtype) for v in model.variants]
    return Choices(tuple(listed), weights_fixed=fixed)


def _require_choosable(hosted: Sequence[HostedModel]) -> None:
    """Raises ConfigError for variants that no request could ever get."""
    problems = [
        f"model {model.id} lists the variant {key.quantization}, but its checkpoint is quantized already; "
        "list kv_cache_dtype only, or give the checkpoint it was made from."
        for model in hosted
        for key in model.choices.listed
        if model.choices.weights_fixed and key.quantization is not None
    ]
    if problems:
        raise ConfigError(problems)


def _provide(
    config: EngineConfig,
    folder: Path,
    budget_bytes: int,
    worker: Callable[..., WorkerModel],
    key: VariantKey,
    limits: KvLimits,
) -> Provision:
    _require_files(folder)
    if key.quantization is not None:
        config = replace(config, quantization=None if key.quantization == UNQUANTIZED else key.quantization)
    if key.kv_cache_dtype != "auto":
        config = replace(config, kv_cache_dtype=cast("KVCacheDtype", key.kv_cache_dtype))
    name = str(key)
    final, estimate = sized(config, budget_bytes, limits)
    logger.info("%s would take %s bytes.", name, f"{sum(a.bytes for a in estimate.awake()):,}")
    if estimate.kv_most_bytes is None:
        level = logging.WARNING if any(limits) else logging.INFO
        logger.log(
            level,
            "%s keeps the size of its KV cache on %s; its notes say why once it is loaded.",
            name,
            estimate.device,
        )
    return Provision(
        estimate,
        lambda: worker(final, name=name),
        facts_of_config(final),
    )


def _require_files(folder: Path) -> None:
    """Raises CheckpointError if the folder is gone or has no tokenizer, as every request needs one."""
    if not folder.is_dir():
        raise CheckpointError(f"its folder {folder} is gone. Put it back, or remove the model.")
    if not (folder / "tokenizer.json").is_file():
        Tokenizer.load(folder)


def _served(model: ModelSettings, folder: Path) -> Callable[[Registry], ServedModel]:
    """What makes the model that the API offers, once the registry knows it. Raises CheckpointError."""
    defaults, vocab_size = generation_defaults(folder), _vocab_size(folder)
    return lambda registry: ServedModel(
        id=model.id,
        engine=registry.engine(model.id),
        tokenizer_source=partial(Tokenizer.load, folder),
        generation_defaults=defaults,
        registry=registry,
        config_vocab_size=vocab_size,
        aliases=model.aliases,
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


def _budgets(
    chosen: Sequence[tuple[ModelSettings, EngineConfig]], budget_bytes: int, host_budget_bytes: int | None
) -> dict[str, Budget]:
    """`budget_bytes` for each device that computes; the host's memory is a device of its own.

    Half of the host's memory by default: parked weights are page-locked, and a host that has none left dies.
    """
    devices = {compute_device(config) for _, config in chosen}
    if host_budget_bytes is None:
        host_budget_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return {HOST: Budget(host_budget_bytes)} | {device: Budget(budget_bytes) for device in devices}


def _require_room(hosted: Sequence[HostedModel], budgets: dict[str, Budget]) -> None:
    """Raises ConfigError if what is to be loaded at start doesn't fit together."""
    first = [model for model in hosted if model.at_start]
    needed = per_device(
        [amount for m in first for amount in m.provide(m.key, m.entry.kv_limits).estimate.awake()]
    )
    problems = [
        f"the models with load: start ({', '.join(model.id for model in first)}) take {size:,} bytes of "
        f"{device} together; {_limit_of(device, budgets)} is {budgets[device].total_bytes:,}. Raise it, or "
        "set load: on_demand for some of them."
        for device, size in needed.items()
        if size > budgets[device].reservable_bytes
    ]
    if problems:
        raise ConfigError(problems)


def _limit_of(device: str, budgets: dict[str, Budget]) -> str:
    return "host_budget_bytes" if device == HOST and len(budgets) > 1 else "memory_budget_bytes"
