"""Operations as JSON objects.

Purpose: what administrators see of one operation.
Does not know: HTTP.
Invariant: times are Unix times in seconds; what is not known yet is null.
"""

from __future__ import annotations

from typing import Any

from memory_efficient_gpt_server.registry.events import AdminUnload
from memory_efficient_gpt_server.registry.operations import Operation, error_view


def operation_view(operation: Operation) -> dict[str, Any]:
    """The operation, with its options where it has any."""
    wish = operation.wish
    options = {"mode": str(wish.mode), "deadline_s": wish.deadline_s} if isinstance(wish, AdminUnload) else {}
    return {
        "id": operation.id,
        "what": operation.what,
        "model": operation.model_id,
        "variant": str(wish.key),
        "options": options,
        "state": operation.state,
        "began_at": operation.began_s,
        "ended_at": operation.ended_s,
        "error": error_view(operation.error),
    }
