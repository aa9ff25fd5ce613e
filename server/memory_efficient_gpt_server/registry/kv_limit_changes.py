"""Other limits for a model's KV cache while the server runs.

Purpose: refuse limits that the model can't keep, and have everybody know those that it can.
Does not know: HTTP, who gives which memory back (kv_sharing.py).
Invariant: what the settings' own checks refuse is refused here in the same words; a loaded model's requests
of full length fit as before. A model's next load begins with, and reserves, what the limits say by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memory_efficient_gpt.errors import ConfigError, InvalidRequestError, MegptError
from memory_efficient_gpt_server.errors import KvLimitTooSmallError, LoadFailedError
from memory_efficient_gpt_server.registry.events import Patched
from memory_efficient_gpt_server.registry.hosted import Provision
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.variants import Estimate, KvLimits, ModelEntry, VariantKey


async def change_kv_limits(
    registry: Registry, entry: ModelEntry, limits: KvLimits, settings: Mapping[str, Any]
) -> None:
    """Give a model `settings`, with these limits among them. To be called by who holds `registry.changing`.

    Raises InvalidRequestError for limits that settings can't have either, and for a KV cache that keeps its
    size; KvLimitTooSmallError with figures; LoadFailedError if the checkpoint is unusable; DrainingError.
    """
    if (problem := limits.problem()) is not None:
        raise InvalidRequestError(problem, param=_first(settings))
    present = await registry.present_needs(entry.id)
    _require_movable(entry.id, limits, present, settings)
    _require_one_request(limits, present)
    try:
        found = await registry.provisions.under(entry.id, limits)
    except ConfigError as error:
        raise InvalidRequestError(" ".join(error.problems), param=_first(settings)) from error
    except MegptError as error:
        raise LoadFailedError(f"Model {entry.id} can't be loaded: {error.message}") from error
    await _consider(registry, replace(entry, **settings), found)


async def _consider(registry: Registry, entry: ModelEntry, found: Mapping[VariantKey, Provision]) -> None:
    registry.provisions.renew(entry.id, entry.kv_limits, found)
    await registry.consider(Patched(entry, {key: provision.estimate for key, provision in found.items()}))


def _require_movable(
    model_id: str, limits: KvLimits, present: Mapping[VariantKey, Estimate], settings: Mapping[str, Any]
) -> None:
    """Raises InvalidRequestError: a limit that could not hold is not taken. Taking one away is fine."""
    given = limits != KvLimits()
    if given and all(needs.kv_least_bytes is None for needs in present.values()):
        raise InvalidRequestError(
            f"The KV cache of model {model_id} keeps its size, so it can have no {_first(settings)}: the "
            "model's notes say why once it is loaded. Leave it out, or give null.",
            param=_first(settings),
        )


def _require_one_request(limits: KvLimits, present: Mapping[VariantKey, Estimate]) -> None:
    for key, needs in present.items():
        least, hard = needs.kv_least_bytes, limits.hard_bytes
        if least is not None and hard is not None and hard < least:
            raise KvLimitTooSmallError(
                f"kv_hard_limit_bytes is {hard:,}, but one request of full length needs {least:,} bytes of "
                f"the KV cache of {key}. Give at least {least:,}, or null.",
                {"variant": str(key), "kv_hard_limit_bytes": hard, "kv_least_bytes": least},
            )


def _first(settings: Mapping[str, Any]) -> str:
    """The setting that the client gave, for the error's `param`."""
    hard = "kv_hard_limit_bytes"
    return hard if settings.get(hard) is not None else "kv_soft_limit_bytes"
