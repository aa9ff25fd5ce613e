"""From settings to models in worker processes.

Purpose: build the catalog that the app serves.
Does not know: HTTP, when models are started or closed.
Invariant: torch is not imported here; weights are read by workers only.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Final

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import CheckpointError, InvalidRequestError
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.settings import ModelSettings, Settings
from memory_efficient_gpt_server.workers import WorkerModel, divide_threads

logger = logging.getLogger(__name__)

_SAMPLING_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def build_catalog(settings: Settings, *, worker_log_level: str, worker_log_json: bool) -> ModelCatalog:
    """All models of `settings`, none of them started.

    Finds each model's folder (downloads a hub model that is not here yet) and loads its tokenizer.
    Raises ModelNotFoundError, CheckpointError.
    """
    chosen = settings.served_models()
    configs = divide_threads([model.engine_config() for model in chosen], num_usable_cpus())
    return ModelCatalog(
        _served(model, config, worker_log_level, worker_log_json)
        for model, config in zip(chosen, configs, strict=True)
    )


def num_usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _served(model: ModelSettings, config: EngineConfig, log_level: str, log_json: bool) -> ServedModel:
    folder = resolve_model(model.model, model.revision)
    logger.info("%s: %s, %s CPU threads", model.id, folder, config.num_threads)
    return ServedModel(
        id=model.id,
        engine=WorkerModel(config, name=model.id, log_level=log_level, log_json=log_json),
        tokenizer=Tokenizer.load(folder),
        generation_defaults=generation_defaults(folder),
    )


def generation_defaults(folder: Path) -> dict[str, float]:
    """The sampling fields that a checkpoint's generation_config.json recommends. Raises CheckpointError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Download the model again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Download the model again.")
    named = {name: raw[name] for name in _SAMPLING_DEFAULTS if raw.get(name) is not None}
    if named.get("top_k") == 0:  # transformers' way to say "all"
        del named["top_k"]
    return {name: value for name, value in named.items() if _usable(path, name, value)}


def _usable(path: Path, name: str, value: Any) -> bool:
    """Whether a recommendation is one that a request could make; a client must not be blamed for it."""
    try:
        SamplingParams(**{name: value}).validate(vocab_size=1)
    except InvalidRequestError as error:
        logger.warning("%s: %s is left out: %s", path, name, error.message)
        return False
    return True
