"""Operations as JSON objects.

Purpose: what administrators see of one operation.
Does not know: HTTP.
Invariant: times are Unix times in seconds; what is not known yet is null.
"""

from __future__ import annotations

from typing import Any

from memory_efficient_gpt_server.registry.events import AdminLoad, AdminUnload
from memory_efficient_gpt_server.registry.operations import AdminWish, Operation, error_view


def operation_view(operation: Operation) -> dict[str, Any]:
    """The operation, with its options where it has any."""
    wish = operation.wish
    return {
        "id": operation.id,
        "what": operation.what,
        "model": operation.model_id,
        "variant": str(wish.key),
        "options": _options(wish),
        "state": operation.state,
        "began_at": operation.began_s,
        "ended_at": operation.ended_s,
        "error": error_view(operation.error),
    }


def _options(wish: AdminWish) -> dict[str, Any]:
    match wish:
        case AdminLoad():
            return {"evict": "auto" if wish.may_evict else "never"}
        case AdminUnload():
            return {"mode": str(wish.mode), "deadline_s": wish.deadline_s}
        case _:
            return {}
