"""From the registry's refusals to errors that users read.

Purpose: one sentence for each refusal and each aborted lease: what, why, and what to do next.
Does not know: HTTP statuses (errors.py has them).
Invariant: every RefusalKind and every AbortReason has an error.
"""

from __future__ import annotations

import math

from memory_efficient_gpt.errors import EngineFailedError, MegptError, ModelNotFoundError
from memory_efficient_gpt_server.errors import (
    ChurnLimitedError,
    EvictionNeededError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelBusyError,
    ModelLoadingError,
    ModelNotLoadedError,
    ModelPinnedError,
    ModelsBusyError,
    ModelUnloadingError,
    OperationCancelledError,
    ServerFullError,
    WrongStateError,
)
from memory_efficient_gpt_server.registry.effects import AbortReason, RefusalKind, Refuse
from memory_efficient_gpt_server.registry.plan_view import plan_view
from memory_efficient_gpt_server.registry.variants import HOST

DEFAULT_RETRY_AFTER_S = 5.0


def error_for(refusal: Refuse, model_id: str) -> MegptError:
    """The error for whoever asked for `model_id`: a model's id, or a variant's name."""
    wait_s = DEFAULT_RETRY_AFTER_S if refusal.retry_after_s is None else refusal.retry_after_s
    match refusal.kind:
        case RefusalKind.MODEL_NOT_FOUND:
            return ModelNotFoundError(f"There is no model {model_id!r} here.", param="model")
        case RefusalKind.INSUFFICIENT_MEMORY:
            return _insufficient(refusal, model_id)
        case RefusalKind.EVICTION_NEEDED:
            return _eviction_needed(refusal, model_id)
        case RefusalKind.LOAD_FAILED:
            why = (refusal.detail or "no reason was given").rstrip(". ")
            return LoadFailedError(
                f"Model {model_id} could not be loaded: {why}. Repair it, or ask its operator to. It is not "
                f"tried again for the next {max(1, math.ceil(wait_s))} s."
            )
        case RefusalKind.MODEL_BUSY:
            remedy = refusal.detail or "try again later, or use mode drain or abort"
            return ModelBusyError(f"Model {model_id} is in use or waited for: {remedy}.")
        case RefusalKind.MODEL_PINNED:
            return ModelPinnedError(
                f"Model {model_id} is pinned, so it stays as it is. Set pinned to false first: "
                f"PATCH /admin/models/{model_id}, or `megpt set {model_id} pinned=false`."
            )
        case RefusalKind.WRONG_STATE:
            why = refusal.detail or f"GET /admin/models/{model_id} tells its state"
            return WrongStateError(f"Model {model_id} can't do that now: {why}.")
        case RefusalKind.CANCELLED:
            return OperationCancelledError(f"An administrator called this operation on {model_id} off.")
        case _:
            return _try_again(refusal.kind, model_id, wait_s)


def _try_again(kind: RefusalKind, model_id: str, wait_s: float) -> MegptError:
    match kind:
        case RefusalKind.QUEUE_FULL:
            return ServerFullError(
                f"Too many requests wait for models to be loaded, {model_id} among them. Try again later.",
                retry_after_s=wait_s,
            )
        case RefusalKind.CHURN_LIMITED:
            return ChurnLimitedError(
                f"Models were swapped too often of late, so {model_id} is not loaded now. Try again later, "
                "or use fewer models at a time.",
                retry_after_s=wait_s,
            )
        case RefusalKind.MODELS_BUSY:
            return ModelsBusyError(
                f"There was no room for model {model_id}: the loaded models are in use. Try again later.",
                retry_after_s=wait_s,
            )
        case RefusalKind.DRAINING:
            return ModelUnloadingError(
                f"Model {model_id} is being unloaded by an administrator. Try again later.",
                retry_after_s=wait_s,
            )
        case RefusalKind.MODEL_NOT_LOADED:
            return ModelNotLoadedError(
                f"Model {model_id} is not loaded, and this request waits for no load.", retry_after_s=wait_s
            )
        case _:
            return ModelLoadingError(
                f"Model {model_id} is not loaded yet. The load goes on: try again later.",
                retry_after_s=wait_s,
            )


def abort_error(reason: AbortReason, model_id: str) -> MegptError:
    """Why work under a lease was ended."""
    if reason is AbortReason.WORKER_DIED:
        return EngineFailedError(f"The worker of {model_id} died while this request was aboard. Retry.")
    return ModelUnloadingError(
        f"An administrator unloaded model {model_id} while this request was under way. Send it again.",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
    )


def _eviction_needed(refusal: Refuse, model_id: str) -> EvictionNeededError:
    plan = refusal.plan
    if plan is None:
        return EvictionNeededError(
            f"Others would have to leave for {model_id}. Load it with evict: auto.", {}
        )
    needed = " and ".join([f"{size:,} bytes of {device}" for device, size in plan.needed.items()])
    ways = [
        (plan.evict, "would have to leave"),
        (plan.sleep, "would have to sleep"),
        (plan.blocked_by, "can't go now either (in use, loading, leaving or too young)"),
    ]
    who = "; ".join([f"{', '.join(map(str, keys))} {what}" for keys, what in ways if keys])
    return EvictionNeededError(
        f"Model {model_id} needs {needed}, more than is free, and nobody may leave for it: {who}. "
        "Unload a model, or load it with evict: auto.",
        {"plan": plan_view(plan)},
    )


def _insufficient(refusal: Refuse, model_id: str) -> InsufficientMemoryError:
    if refusal.plan is None:
        return InsufficientMemoryError(
            f"Model {model_id} can't be put to sleep: {refusal.detail or 'the host has too little memory'}. "
            "Raise host_budget_bytes, or unload models.",
            {},
        )
    plan = refusal.plan
    short = [
        f"{size:,} bytes of {device}, where at most {plan.reservable[device]:,} can be freed"
        for device, size in plan.needed.items()
        if size > plan.reservable[device]
    ]
    beside_gpu = len(plan.needed) > 1 and all(
        plan.needed[d] <= plan.reservable[d] for d in plan.needed if d != HOST
    )
    limit = "host_budget_bytes" if beside_gpu else "memory_budget_bytes"
    return InsufficientMemoryError(
        f"Model {model_id} needs {' and '.join(short)}. Raise {limit}, unpin a model, or "
        f"give the model a smaller KV cache (whichever of kv_cache_bytes, num_kv_blocks and "
        f"kv_soft_limit_bytes it has, else max_num_seqs or max_model_len).",
        {"plan": plan_view(plan)},
    )
