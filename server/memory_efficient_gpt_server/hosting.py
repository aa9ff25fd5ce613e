"""From settings to models in worker processes.

Purpose: build the catalog that the app serves.
Does not know: HTTP, when models are started or closed.
Invariant: torch is not imported here unless there is a memory budget; weights are read by workers only.
"""

from __future__ import annotations

import logging

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.cpus import num_usable_cpus
from memory_efficient_gpt_server.generation_defaults import generation_defaults
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.supervision import WorkerLimits
from memory_efficient_gpt_server.thread_shares import divide_threads
from memory_efficient_gpt_server.workers import WorkerModel

logger = logging.getLogger(__name__)


def build_catalog(settings: Settings, *, worker_log_level: str, worker_log_json: bool) -> ModelCatalog:
    """All models of `settings`, none of them started.

    Finds each model's folder (downloads a hub model that is not here yet) and loads its tokenizer.
    With a budget a tokenizer is loaded when its model is first asked for.
    Raises ModelNotFoundError, CheckpointError; ConfigError if what is to be loaded at start doesn't fit.
    """
    chosen = settings.served_models()
    configs = divide_threads([model.engine_config() for model in chosen], num_usable_cpus())
    if settings.memory_budget_bytes is not None:
        from memory_efficient_gpt_server.budgeted_hosting import budgeted_catalog  # imports torch: seconds
        from memory_efficient_gpt_server.registry.records import Policy

        return budgeted_catalog(
            list(zip(chosen, configs, strict=True)),
            settings.memory_budget_bytes,
            host_budget_bytes=settings.host_budget_bytes,
            limits=worker_limits(settings),
            policy=Policy(
                max_wait_s=settings.load_wait_s,
                most_swaps=settings.max_swaps,
                churn_window_s=settings.swap_window_s,
            ),
            worker_log_level=worker_log_level,
            worker_log_json=worker_log_json,
        )
    return ModelCatalog(
        _served(model, config, worker_limits(settings), worker_log_level, worker_log_json)
        for model, config in zip(chosen, configs, strict=True)
    )


def worker_limits(settings: Settings) -> WorkerLimits:
    """When workers are given up."""
    return WorkerLimits(
        resume_wait_s=settings.resume_wait_s,
        stall_s=settings.stall_s,
        stall_steps=settings.stall_steps,
        kill_factor=settings.stall_kill_factor,
        max_step_s=settings.max_step_s,
    )


def _served(
    model: ModelSettings, config: EngineConfig, limits: WorkerLimits, log_level: str, log_json: bool
) -> ServedModel:
    folder = resolve_model(model.model, model.revision)
    logger.info("%s: %s, %s CPU threads", model.id, folder, config.num_threads)
    return ServedModel(
        id=model.id,
        engine=WorkerModel(config, name=model.id, log_level=log_level, log_json=log_json, limits=limits),
        tokenizer_source=Tokenizer.load(folder),
        generation_defaults=generation_defaults(folder),
        aliases=model.aliases,
    )
