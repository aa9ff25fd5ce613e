"""What one step of the registry has changed, as plain facts for those who watch.

Purpose: from the states before and after a step, its event and its effects to what is worth telling.
Does not know: who listens, the time of day.
Invariant: pure; every fact can be written as JSON, and none is longer than the registry's own names and
`MOST_CHARACTERS` of a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any, Final

from memory_efficient_gpt_server.registry.effects import (
    Effect,
    GrowKv,
    Refuse,
    StartSleep,
    StartUnload,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.events import (
    AdminLoad,
    Asked,
    BudgetPatched,
    Event,
    KvMoved,
    Loaded,
    LoadFailed,
    Patched,
    Removed,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.records import RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey
from memory_efficient_gpt_server.wording import clipped

MOST_CHARACTERS: Final = 500

SETTINGS: Final = (
    "pinned", "ttl_s", "min_residency_s", "priority", "kv_soft_limit_bytes", "kv_hard_limit_bytes",
)  # fmt: skip
"""Fields of a model that administrators may change while the server runs."""


class HappeningKind(StrEnum):
    """What happened."""

    STATE = "state"
    LOAD = "load"
    EVICTION = "eviction"
    REFUSAL = "refusal"
    OPERATION = "operation"
    KV = "kv"
    BUDGET = "budget"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happened. `facts` are ready for JSON."""

    kind: HappeningKind
    facts: Mapping[str, Any]


def happenings(
    before: RegistryState,
    event: Event,
    effects: tuple[Effect, ...],
    after: RegistryState,
    now_s: float,
    asked_for: Callable[[int], VariantKey | None],
) -> list[Happening]:
    """All that a step has changed. asked_for: what a waiting request asked for; None for operations.

    A variant that passed through several states within the step is told of once: from the first to the last.
    """
    return [
        *_changed_settings(before, event, after),
        *_load(before, event, after, now_s),
        *_evictions(before, effects),
        *_kv_moves(before, event, effects, after),
        *_states(before, after),
        *_refusals(effects, asked_for),
    ]


def struck_before_load(before: RegistryState, event: Asked | AdminLoad, after: RegistryState) -> bool:
    """Whether this was a load that failed before a process was started for it: its files are unusable."""
    old, new = before.records.get(event.key), after.records.get(event.key)
    failed = event.problem is not None and new is not None and new.state is State.FAILED
    return failed and (old is None or new is None or old.life is not new.life)


def reason_text(reason: str | None) -> str | None:
    """A reason, cut to a length that a buffer of many can bear."""
    return None if reason is None else clipped(reason, MOST_CHARACTERS)


def _of(key: VariantKey) -> dict[str, Any]:
    return {"model": key.model_id, "variant": str(key)}


def _states(before: RegistryState, after: RegistryState) -> Iterator[Happening]:
    pairs = zip_longest(after.records.values(), before.records.values())
    changed = [new for new, old in pairs if new is not old and new is not None]
    for record in changed:  # hardly ever more than one: most steps are leases
        key, old = record.key, before.records.get(record.key)
        was = State.UNLOADED if old is None else old.state
        if was is not record.state:
            facts = {"from": str(was), "to": str(record.state), "reason": reason_text(record.life.reason)}
            yield Happening(HappeningKind.STATE, _of(key) | facts)


def _load(before: RegistryState, event: Event, after: RegistryState, now_s: float) -> Iterator[Happening]:
    """The end of a load that nobody has called off; that of one that could not begin too."""
    if isinstance(event, Asked | AdminLoad) and struck_before_load(before, event, after):
        reason = reason_text(event.problem)
        yield Happening(
            HappeningKind.LOAD, _of(event.key) | {"result": "failure", "seconds": 0.0, "reason": reason}
        )
    if not isinstance(event, Loaded | LoadFailed | WorkerDied):
        return
    old = before.records.get(event.key)
    if old is None or old.state is not State.LOADING:
        return
    record: VariantRecord = after.records[event.key]
    ready = record.state is State.READY
    facts = {
        "result": "success" if ready else "failure",
        "seconds": round(now_s - old.life.since_s, 3),
        "reason": None if ready else reason_text(record.life.reason),
    }
    yield Happening(HappeningKind.LOAD, _of(event.key) | facts)


def _evictions(before: RegistryState, effects: tuple[Effect, ...]) -> Iterator[Happening]:
    for effect in effects:
        match effect:
            case StartUnload(key, reason) if reason is not UnloadReason.FAILURE:
                way = "unload"
            case StartSleep(key, reason):
                way = "sleep"
            case _:
                continue
        facts = {"reason": str(reason), "way": way, "held_bytes": before.ledger.held_by_device(key)}
        yield Happening(HappeningKind.EVICTION, _of(key) | facts)


def _kv_moves(
    before: RegistryState, event: Event, effects: tuple[Effect, ...], after: RegistryState
) -> Iterator[Happening]:
    """KV memory that a model got, and that one gave; `partner`: whose it was or for whom it went."""
    giver = event.source if isinstance(event, KvMoved) else None
    gift = None if giver is None or giver not in before.records else before.records[giver].giving
    partners = {} if giver is None or gift is None else {giver: gift.target, gift.target: giver}
    grown = [effect.key for effect in effects if isinstance(effect, GrowKv)]
    for key in dict.fromkeys([*([] if giver is None else [giver]), *grown]):
        now_bytes = kv_bytes(after.ledger, key)
        change = now_bytes - kv_bytes(before.ledger, key)
        if change and key in after.records:
            partner = partners.get(key)
            device = after.records[key].needs.device
            facts = {"device": device, "change_bytes": change, "kv_bytes": now_bytes}
            told = {"partner": None if partner is None else str(partner)}
            yield Happening(HappeningKind.KV, _of(key) | facts | told)


def _refusals(
    effects: tuple[Effect, ...], asked_for: Callable[[int], VariantKey | None]
) -> Iterator[Happening]:
    """One for all requests that get the same answer in this step: hundreds may wait for a model."""
    counts: Counter[tuple[VariantKey, str]] = Counter()
    reasons: dict[tuple[VariantKey, str], str | None] = {}
    for effect in effects:
        if isinstance(effect, Refuse) and (key := asked_for(effect.waiter)) is not None:
            counts[key, str(effect.kind)] += 1
            reasons[key, str(effect.kind)] = reason_text(effect.detail)
    for (key, code), count in counts.items():
        facts = {"code": code, "requests": count, "reason": reasons[key, code]}
        yield Happening(HappeningKind.REFUSAL, _of(key) | facts)


def _changed_settings(before: RegistryState, event: Event, after: RegistryState) -> Iterator[Happening]:
    match event:
        case Patched(entry):
            old = before.entries.get(entry.id)
            new = {name: getattr(entry, name) for name in SETTINGS}
            if old is not None:
                new = {name: value for name, value in new.items() if value != getattr(old, name)}
            if old is None or new:
                change = "registered" if old is None else "changed"
                facts = {"model": entry.id, "change": change, "settings": new}
                yield Happening(HappeningKind.MODEL, facts)
        case Removed(_, model_id) if model_id in before.entries and model_id not in after.entries:
            yield Happening(HappeningKind.MODEL, {"model": model_id, "change": "removed", "settings": {}})
        case BudgetPatched(device, budget):
            was = before.ledger.budgets[device].total_bytes
            figures = {"device": device, "from_bytes": was, "budget_bytes": budget.total_bytes}
            yield Happening(HappeningKind.BUDGET, figures)
