"""Models that come and go while the server runs.

Purpose: add a model to registry and catalog, remove one, look for new folders in `models_dir`.
Does not know: HTTP, how models are made.
Invariant: a model is in the catalog only while the registry knows it; one that can't be made changes
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from memory_efficient_gpt.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from memory_efficient_gpt_server.daemon_thread import in_daemon_thread
from memory_efficient_gpt_server.errors import ModelExistsError
from memory_efficient_gpt_server.model_settings import ModelSettings, models_in
from memory_efficient_gpt_server.model_sources import allowed_source
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.registry.changes import add_model, model_exists, remove_model
from memory_efficient_gpt_server.registry.hosted import HostedModel
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.variants import find_entry

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rescan:
    """What was found in `models_dir`. Ids but for `problems`: a sentence for each that can't be served."""

    added: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that can be offered. Nothing of it is loaded."""

    hosted: HostedModel
    served: Callable[[Registry], ServedModel]


async def prepare(
    catalog: ModelCatalog, registry: Registry, model: ModelSettings, models_dir: Path | None
) -> Prepared:
    """Find (or download) a model that may come while the server runs. Changes nothing; may be cancelled.

    Raises InvalidRequestError, ModelNotFoundError, ModelExistsError.
    """
    if model.load == "start" and "load" in model.model_fields_set:
        raise InvalidRequestError(
            "load is for models of the settings: the server has started. Leave it out; "
            f"POST /admin/models/{model.id}/load loads the model once it is registered.",
            param="load",
        )
    source = await asyncio.to_thread(allowed_source, model.model, models_dir)
    model = model.model_copy(update={"model": source, "load": "on_demand"})
    prepared = await _prepare(catalog, registry, model)
    hosted = prepared.hosted  # what is wrong with it is told now, or each of its clients would be
    await _in_thread(partial(hosted.provide, hosted.key, hosted.entry.kv_limits))
    return prepared


async def offer(catalog: ModelCatalog, registry: Registry, model: Prepared) -> None:
    """From now on clients may ask for the model. Not to be cancelled.

    Raises ModelExistsError, DrainingError.
    """
    await add_model(registry, model.hosted)
    catalog.add(model.served(registry))


async def unregister(catalog: ModelCatalog, registry: Registry, name: str) -> str:
    """Offer a model no more; returns its id. Raises ModelNotFoundError, ModelBusyError, DrainingError."""
    model_id = await remove_model(registry, name)
    catalog.remove(model_id)
    return model_id


async def rescan(catalog: ModelCatalog, registry: Registry, models_dir: Path | None) -> Rescan:
    """Register what is new in `models_dir`. What is gone from it is told, not removed.

    Raises InvalidRequestError without a models_dir, DrainingError.
    """
    if models_dir is None:
        raise InvalidRequestError("This server has no models_dir, so there is nothing to look through.")
    problems: list[str] = []
    found = await asyncio.to_thread(models_in, models_dir, "on_demand", problems)
    added: list[str] = []
    for model in found:
        if model.id in registry.models:
            problems += _taken(registry, model)
            continue
        try:
            await offer(catalog, registry, await _prepare(catalog, registry, model))
        except (InvalidRequestError, ModelNotFoundError, ModelExistsError) as error:
            problems.append(f"{model.id}: {error.message}")
        else:
            added.append(model.id)
    missing = await asyncio.to_thread(_missing, registry, models_dir)
    return Rescan(tuple(added), missing, tuple(problems))


def _taken(registry: Registry, model: ModelSettings) -> list[str]:
    """What is to be said of a folder whose name is a registered model's id: nothing if it is that model."""
    source = registry.entry(model.id).source
    if Path(source).absolute() == Path(model.model):
        return []
    return [
        f"models_dir has a folder {model.id!r}, which is the id of another model (from {source}); rename the "
        "folder."
    ]


def _missing(registry: Registry, models_dir: Path) -> tuple[str, ...]:
    root = models_dir.absolute()
    entries = list(registry.state.entries.values())
    inside = [entry for entry in entries if Path(entry.source).parent == root]
    return tuple([entry.id for entry in inside if not Path(entry.source).is_dir()])


async def _prepare(catalog: ModelCatalog, registry: Registry, model: ModelSettings) -> Prepared:
    assert catalog.maker is not None, "a registry without a maker of models"
    for name in (model.id, *model.aliases):  # before anything is downloaded; again when it is offered
        if find_entry(registry.state.entries, name) is not None:
            raise model_exists(registry, name)
    budgets = {device: budget.total_bytes for device, budget in registry.state.ledger.budgets.items()}
    hosted, served = await _in_thread(partial(catalog.maker.make, model, budgets))
    return Prepared(hosted, served)


async def _in_thread(look: Callable[[], T]) -> T:
    """What `look` finds out about a model. Raises InvalidRequestError, ModelNotFoundError."""
    try:
        return await in_daemon_thread(look)
    except ConfigError as error:
        raise InvalidRequestError(" ".join(error.problems)) from error
    except (CheckpointError, UnsupportedModelError) as error:
        raise InvalidRequestError(error.message, param="model") from error
