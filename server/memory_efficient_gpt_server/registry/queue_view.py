"""Who waits for which model, and what each waits for, as a JSON object.

Purpose: the load queue in the order in which the scheduler serves it, with the planner's reasons.
Does not know: HTTP.
Invariant: it changes nothing, and judges as `scheduling` does: room that is kept for those ahead is not
counted as free for those behind. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memory_efficient_gpt_server.registry.load_queue import Waiter
from memory_efficient_gpt_server.registry.planning import LoadRequest, Plan, Verdict, missing_bytes, plan
from memory_efficient_gpt_server.registry.records import RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.scheduling import churn_wait_s, loading_order
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey

OperationOf = Callable[[int], str | None]
"""The id of the operation that a waiter stands for; None for a request."""


def queue_view(state: RegistryState, now_s: float, operation_of: OperationOf) -> dict[str, Any]:
    """The whole queue, and whether swaps are held back."""
    policy, claimed = state.policy, dict[str, int]()
    groups = []
    for position, key in enumerate(loading_order(state, now_s), start=1):
        why = _why(state, state.records[key], now_s, claimed)
        groups.append(_group(state, key, now_s, operation_of) | {"position": position, "why": why})
    return {
        "waiting": len(state.queue),
        "most_waiting": policy.max_waiters,
        "loading": _loading(state),
        "most_loading": policy.max_loads,
        "groups": groups,
        "churn": _churn(state, now_s),
    }


def _group(state: RegistryState, key: VariantKey, now_s: float, operation_of: OperationOf) -> dict[str, Any]:
    waiters = state.queue.of(key)
    return {
        "model": key.model_id,
        "variant": str(key),
        "state": str(state.records[key].state),
        "priority": state.entries[key.model_id].priority,
        "waiting": len(waiters),
        "waited_s": now_s - waiters[0].asked_s,
        "impatient": state.queue.impatient(key, now_s, state.policy.patience_s),
        "waiters": [_waiter(waiter, now_s, operation_of) for waiter in waiters],
    }


def _waiter(waiter: Waiter, now_s: float, operation_of: OperationOf) -> dict[str, Any]:
    return {
        "kind": "request" if waiter.wants_lease else "operation",
        "operation": None if waiter.wants_lease else operation_of(waiter.id),
        "waited_s": now_s - waiter.asked_s,
        "gives_up_in_s": waiter.deadline_s - now_s,
    }


def _why(
    state: RegistryState, record: VariantRecord, now_s: float, claimed: dict[str, int]
) -> dict[str, Any]:
    """Why the variant is not ready. Adds to `claimed` what the scheduler keeps for it."""
    match record.state:
        case State.LOADING | State.WAKING:
            eta_s = plan(LoadRequest(record.key, record.needs), state, now_s).eta_s
            return _told(str(record.state), "It is on its way.", eta_s=eta_s)
        case State.QUEUED | State.ASLEEP:
            its_plan = plan(LoadRequest(record.key, record.needs), state, now_s, claimed)
            why = _blocked(state, its_plan, now_s, claimed)
            _claim(state, record.key, its_plan, now_s, claimed)
            return why
        case State.READY:
            return _told("worker_replaced", "Its worker has died; it is served by the next one.")
        case _:
            message = "Its earlier process has not ended yet; it is loaded again after that."
            return _told(str(record.state), message)


def _blocked(
    state: RegistryState, its_plan: Plan, now_s: float, claimed: Mapping[str, int]
) -> dict[str, Any]:
    churn_s = churn_wait_s(state, now_s)
    missing = missing_bytes(state, its_plan.needed, claimed)
    if _loading(state) >= state.policy.max_loads:
        return _told("load_slots", "Enough other models are being loaded.", its_plan, missing)
    match its_plan.verdict:
        case Verdict.NOW:
            return _told("now", "There is room: it is about to be loaded.", its_plan, missing)
        case Verdict.AFTER_FREEING:
            message = "Models that leave are giving back what it needs."
            return _told("after_freeing", message, its_plan, missing)
        case Verdict.AFTER_SHRINKING:
            message = "Idle models are about to give KV memory for it; nobody leaves."
            return _told("after_shrinking", message, its_plan, missing)
        case Verdict.AFTER_EVICTION if churn_s > 0:
            message = "Idle models could leave for it, but models were swapped too often of late."
            return _told("churn_limited", message, its_plan, missing, wait_s=churn_s)
        case Verdict.AFTER_EVICTION:
            return _told("after_eviction", "Idle models are about to leave for it.", its_plan, missing)
        case Verdict.NEVER:
            return _told("never", "It is larger than the budget without what stays.", its_plan, missing)
        case _:
            message = (
                "What holds the memory is in use, draining, loading, kept for others, or too young to go."
            )
            return _told("busy", message, its_plan, missing)


def _told(
    code: str,
    message: str,
    its_plan: Plan | None = None,
    missing: Mapping[str, int] | None = None,
    *,
    eta_s: float | None = None,
    wait_s: float | None = None,
) -> dict[str, Any]:
    return {
        "code": code,
        "message": message,
        "needed_bytes": {} if its_plan is None else dict(its_plan.needed),
        "missing_bytes": dict(missing or {}),
        "evict": [] if its_plan is None else [str(key) for key in its_plan.evict],
        "sleep": [] if its_plan is None else [str(key) for key in its_plan.sleep],
        "blocked_by": [] if its_plan is None else [str(key) for key in its_plan.blocked_by],
        "wait_s": wait_s,
        "eta_s": eta_s if its_plan is None else its_plan.eta_s,
    }


def _claim(
    state: RegistryState, key: VariantKey, its_plan: Plan, now_s: float, claimed: dict[str, int]
) -> None:
    if _loading(state) >= state.policy.max_loads:
        return
    impatient = state.queue.impatient(key, now_s, state.policy.patience_s)
    if its_plan.verdict is Verdict.AFTER_FREEING or (impatient and its_plan.verdict is not Verdict.NEVER):
        for device, size in its_plan.needed.items():
            claimed[device] = claimed.get(device, 0) + size


def _loading(state: RegistryState) -> int:
    return sum([r.state in (State.LOADING, State.WAKING) for r in state.records.values()])


def _churn(state: RegistryState, now_s: float) -> dict[str, Any]:
    churn = state.churn
    return {
        "swaps": len([t for t in churn.swaps_s if t > now_s - churn.window_s]),
        "most_swaps": churn.most_swaps,
        "window_s": churn.window_s,
        "wait_s": churn_wait_s(state, now_s),
    }
