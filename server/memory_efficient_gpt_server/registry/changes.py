"""What administrators change while the server runs: settings of models, budgets, the models themselves.

Purpose: from what is wished to the events that bring it about, with the refusals that need the whole state.
Does not know: HTTP, where models come from.
Invariant: a change is made of the settings as they are at that time, one after the other; all are gone when
the server ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.errors import BudgetTooSmallError, ModelBusyError, ModelExistsError
from memory_efficient_gpt_server.registry.events import BudgetPatched, Patched
from memory_efficient_gpt_server.registry.hosted import HostedModel
from memory_efficient_gpt_server.registry.kv_limit_changes import change_kv_limits
from memory_efficient_gpt_server.registry.kv_room import kept_bytes, kv_bytes
from memory_efficient_gpt_server.registry.ledger import Stage
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import RegistryView, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey, find_entry


async def change_model(registry: Registry, name: str, settings: Mapping[str, Any]) -> None:
    """Change a model's settings (fields of its ModelEntry).

    Raises ModelNotFoundError, DrainingError; for limits of its KV cache what change_kv_limits raises.
    """
    async with registry.changing:
        entry = registry.entry(registry.hosted(name).id)
        limits = entry.kv_limits._replace(**_limits_among(settings))
        if limits == entry.kv_limits:
            await registry.consider(Patched(replace(entry, **settings)))
        else:
            await change_kv_limits(registry, entry, limits, settings)


def _limits_among(settings: Mapping[str, Any]) -> dict[str, int | None]:
    names = {"soft_bytes": "kv_soft_limit_bytes", "hard_bytes": "kv_hard_limit_bytes"}
    return {field: settings[name] for field, name in names.items() if name in settings}


async def change_budget(registry: Registry, device: str, budget_bytes: int) -> None:
    """Give a device another budget; idle models leave and those in use drain if it is too small for them.

    Raises InvalidRequestError for an unknown device, BudgetTooSmallError below what can't be made to leave,
    DrainingError.
    """
    async with registry.changing:
        ledger = registry.state.ledger
        if device not in ledger.budgets:
            known = ", ".join(sorted(ledger.budgets))
            raise InvalidRequestError(
                f"There is no device {device[:80]!r} here. Devices: {known}.", param="device"
            )
        staying = staying_bytes(registry.state, device)
        least = sum(staying.values()) + ledger.budgets[device].headroom_bytes
        if budget_bytes < least:
            holders = ", ".join(f"{name} {size:,}" for name, size in staying.items())
            raise BudgetTooSmallError(
                f"budget_bytes is {budget_bytes:,}, but {least:,} bytes of {device} can't be freed "
                f"({holders}). Unpin a model, or give at least {least:,}.",
                {"device": device, "least_budget_bytes": least, "staying_bytes": staying},
            )
        budget = replace(ledger.budgets[device], total_bytes=budget_bytes)
        await registry.consider(BudgetPatched(device, budget))


async def add_model(registry: Registry, model: HostedModel) -> None:
    """Offer one more model. Raises ModelExistsError, DrainingError."""
    async with registry.changing:
        for name in (model.id, *model.entry.aliases):
            if find_entry(registry.state.entries, name) is not None or name in registry.models:
                raise model_exists(registry, name)
        await registry.adopt(model)


async def remove_model(registry: Registry, name: str) -> str:
    """Forget a model that is not loaded; returns its id. Raises ModelNotFoundError, ModelBusyError."""
    async with registry.changing:
        model_id = registry.hosted(name).id
        try:
            await registry.dismiss(model_id)
        except ModelBusyError:
            raise _in_the_way(registry, model_id) from None
    return model_id


def _in_the_way(registry: Registry, model_id: str) -> ModelBusyError:
    """Why a model can't be removed: each variant is unloaded by itself."""
    states = {key: registry.engine(key).state for key in registry.variants(model_id)}
    loaded = [f"{key} is {state}" for key, state in states.items() if state not in ("unloaded", "failed")]
    others = any(not key.as_configured for key in states)
    pinned = registry.entry(model_id).pinned
    first = f"Unpin it (PATCH /admin/models/{model_id}), then unload it" if pinned else "Unload it first"
    return ModelBusyError(
        f"Model {model_id} can't be removed yet: {', '.join(loaded) or 'its memory is not free yet'}. "
        f"{first}: POST /admin/models/{model_id}/unload"
        + (", for a variant with its `optimizations`." if others else ".")
    )


def model_exists(registry: Registry, name: str) -> ModelExistsError:
    """The refusal of a second model of that name, which is a registered model's id or alias."""
    model_id = registry.hosted(name).id
    if model_id != name:
        return ModelExistsError(
            f"{name!r} is an alias of the model {model_id!r} already. Give another name.", param="id"
        )
    return ModelExistsError(
        f"There is a model {model_id!r} already. Give another id, or remove it: "
        f"DELETE /admin/models/{model_id}.",
        param="id",
    )


def staying_bytes(view: RegistryView, device: str) -> dict[str, int]:
    """Bytes of a device that nothing but an administrator can free, by holder: pinned models, and leaks.

    Without KV memory that a pinned model can spare.
    """
    staying: dict[str, int] = {}
    for owner, entries in view.ledger.entries.items():
        record = view.records.get(owner) if isinstance(owner, VariantKey) else None
        stays = record is None or (
            view.entries[record.key.model_id].pins(record.key) and record.state is not State.UNLOADING
        )
        size = sum([e.bytes for e in entries if e.device == device and (stays or e.stage is Stage.LEAKED)])
        if stays and record is not None:
            size -= _spare_kv_bytes(view, record, device)
        if size:
            staying[str(owner)] = size
    return staying


def _spare_kv_bytes(view: RegistryView, record: VariantRecord, device: str) -> int:
    if record.needs.device != device:
        return 0
    return kv_bytes(view.ledger, record.key) - kept_bytes(view, record, at_best=True)
