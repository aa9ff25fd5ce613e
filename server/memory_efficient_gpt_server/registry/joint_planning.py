"""Whether several loads fit together: the planner of one load, asked for all of them at once.

Purpose: what loading several variants would mean, which of them would not fit, and what would instead.
Does not know: waiters, workers; how one load is judged (planning.py).
Invariant: a plan changes nothing; no load of a plan makes room for another of it. Loads are counted in the
order given, each with what the ones before it leave, and one that does not fit takes nothing from later ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from memory_efficient_gpt_server.registry.planning import (
    UP,
    LoadRequest,
    Verdict,
    Wanted,
    best_estimate,
    blockers,
    judge,
    needed_amounts,
    remaining_s,
    reservable_bytes,
    wake_s,
)
from memory_efficient_gpt_server.registry.records import RegistryView
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Amount, Kind, VariantKey, per_device
from memory_efficient_gpt_server.registry.victims import Victims, Way, load_rate, reload_s

_FITS: Final = frozenset(
    {Verdict.NOW, Verdict.AFTER_FREEING, Verdict.AFTER_SHRINKING, Verdict.AFTER_EVICTION}
)
_NOBODY: Final = Victims({}, covered=False)


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """One of several. Sizes in bytes.

    fits: beside those before it that fit. bytes: by kind, what it takes once it is loaded. needed: by device,
    what has to be reserved for that; nothing if it is loaded already, or being loaded.
    """

    key: VariantKey
    verdict: Verdict
    bytes: Mapping[Kind, int]
    needed: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether it can be loaded with those before it, without cutting or awaiting anyone's requests."""
        return self.verdict in _FITS


@dataclass(frozen=True, slots=True)
class Change:
    """Loads that would fit instead. text: for people ("without draft"). needed: bytes by device."""

    text: str
    keys: tuple[VariantKey, ...]
    needed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class JointPlan:
    """What loading all would mean; fields as Plan's. would_fit: changes, if it does not fit as it is."""

    loads: tuple[PlannedLoad, ...]
    verdict: Verdict
    needed: Mapping[str, int]
    reservable: Mapping[str, int]
    victims: Victims
    blocked_by: tuple[VariantKey, ...]
    eta_s: float | None
    would_fit: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all of them fit."""
        return self.verdict in _FITS


def plan_together(requests: Sequence[LoadRequest], view: RegistryView, now_s: float) -> JointPlan:
    """The plan for all `requests`, of different variants; their candidates are what might be taken instead.

    Raises LedgerError for an unknown device.
    """
    plan = _plan(requests, view, now_s)
    return plan if plan.fits else replace(plan, would_fit=tuple(_changes(requests, view, now_s)))


def _plan(requests: Sequence[LoadRequest], view: RegistryView, now_s: float) -> JointPlan:
    loads: list[PlannedLoad] = []
    fitting: list[LoadRequest] = []
    for request in requests:
        verdict = _judged(view, [*fitting, request], now_s)[0]
        kinds = best_estimate(request, view).by_kind()
        loads.append(PlannedLoad(request.key, verdict, kinds, _needed(view, [request])))
        if verdict in _FITS:
            fitting.append(request)
    needed, wanted = _needed(view, requests), _wanted(view, requests)
    verdict, victims = _judged(view, requests, now_s)
    return JointPlan(
        tuple(loads),
        verdict,
        needed,
        reservable_bytes(view, wanted, needed),
        victims,
        blockers(view, wanted, needed) if verdict is Verdict.BUSY else (),
        _eta_s(view, requests, verdict, victims, now_s) if verdict in _FITS else None,
    )


def _judged(view: RegistryView, requests: Sequence[LoadRequest], now_s: float) -> tuple[Verdict, Victims]:
    wanted, needed = _wanted(view, requests), _needed(view, requests)
    verdict, victims = judge(view, wanted, needed, reservable_bytes(view, wanted, needed), now_s, {})
    makes_room = verdict in (Verdict.AFTER_SHRINKING, Verdict.AFTER_EVICTION)
    return verdict, victims if makes_room else _NOBODY


def _is_up(view: RegistryView, key: VariantKey) -> bool:
    record = view.records.get(key)
    return record is not None and record.state in UP


def _wanted(view: RegistryView, requests: Sequence[LoadRequest]) -> Wanted:
    keys = [request.key for request in requests]
    up = tuple([key for key in keys if _is_up(view, key)])
    return Wanted(tuple([key for key in keys if key not in up]), up)


def _needed(view: RegistryView, requests: Sequence[LoadRequest]) -> dict[str, int]:
    amounts: list[Amount] = []
    for request in requests:
        if not _is_up(view, request.key):
            record = view.records.get(request.key)
            amounts += needed_amounts(record, best_estimate(request, view))
    return per_device(amounts)


def _eta_s(
    view: RegistryView, requests: Sequence[LoadRequest], verdict: Verdict, victims: Victims, now_s: float
) -> float:
    """Seconds until the last one could serve: as many at a time as may load, once there is room."""
    leaving = [view.records[key] for key, way in victims.ways.items() if way is not Way.SHRINK]
    leaving += [r for r in view.records.values() if r.state is State.UNLOADING and verdict is not Verdict.NOW]
    room_s = max([r.timings.unload_s or view.policy.unload_s for r in leaving], default=0.0)
    under_way = {
        r.key: remaining_s(view, r, now_s)
        for r in view.records.values()
        if r.state in (State.LOADING, State.WAKING)
    }
    free = [0.0] * (view.policy.max_loads - len(under_way))
    places = [*free, *sorted(under_way.values())][: view.policy.max_loads]  # a heap, as it is sorted
    ends = [0.0]
    for request in requests:
        if _is_up(view, request.key):
            ends.append(under_way.get(request.key, 0.0))
        else:
            end_s = max(heapq.heappop(places), room_s) + _own_s(view, request)
            heapq.heappush(places, end_s)
            ends.append(end_s)
    return max(ends)


def _own_s(view: RegistryView, request: LoadRequest) -> float:
    record = view.records.get(request.key)
    if record is None:
        return sum([amount.bytes for amount in request.estimate.awake()]) / load_rate(view)
    return wake_s(view, record) if record.state is State.ASLEEP else reload_s(view, record)


def _changes(requests: Sequence[LoadRequest], view: RegistryView, now_s: float) -> Iterator[Change]:
    """One of the loads as another variant of its model, then without one of them; those that fit."""
    taken = {request.key for request in requests}
    for number, request in enumerate(requests):
        for candidate in request.candidates:
            if candidate.key not in taken:
                other = LoadRequest(candidate.key, candidate.estimate)
                changed = [*requests[:number], other, *requests[number + 1 :]]
                yield from _if_it_fits(f"with {candidate.label} for {request.key}", changed, view, now_s)
    for number, request in enumerate(requests):
        rest = [*requests[:number], *requests[number + 1 :]]
        if rest:
            yield from _if_it_fits(f"without {request.key}", rest, view, now_s)


def _if_it_fits(
    text: str, requests: Sequence[LoadRequest], view: RegistryView, now_s: float
) -> Iterator[Change]:
    if _judged(view, requests, now_s)[0] in _FITS:
        yield Change(text, tuple([request.key for request in requests]), _needed(view, requests))
