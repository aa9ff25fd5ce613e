"""/admin/queue and /admin/operations: who waits for what, how wishes went, and calling one off.

Purpose: views of the load queue and of administrators' operations, for the holder of the admin key.
Does not know: how either comes about.
Invariant: what is read here changes nothing; what is called off was answered to all who waited for it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from memory_efficient_gpt_server.deps import ADMIN_ONLY
from memory_efficient_gpt_server.registry.operation_view import operation_view
from memory_efficient_gpt_server.registry.queue_view import queue_view
from memory_efficient_gpt_server.routes.admin import CurrentRegistry

router = APIRouter(dependencies=ADMIN_ONLY)


@router.get("/admin/queue")
async def queue(registry: CurrentRegistry) -> dict[str, Any]:
    """Who waits for which model, in the order in which they are served: since when, and what each model
    that is not loaded yet waits for; and whether swaps are held back (churn)."""

    def operation_of(waiter: int) -> str | None:
        found = registry.operations.of_waiter(waiter)
        return None if found is None else found.id

    return queue_view(registry.state, registry.now_s(), operation_of)


@router.get("/admin/operations")
async def list_operations(registry: CurrentRegistry) -> dict[str, Any]:
    """What administrators have asked for (load, unload, sleep, wake), the newest first: what goes on, and the
    last 256 that ended."""
    return {"operations": [operation_view(operation) for operation in registry.operations]}


@router.get("/admin/operations/{operation_id}")
async def get_operation(operation_id: str, registry: CurrentRegistry) -> dict[str, Any]:
    """One operation: running, done, cancelled, or failed with its error. 404 if it ended long ago."""
    return operation_view(registry.operations.get(operation_id))


@router.delete("/admin/operations/{operation_id}")
async def cancel_operation(operation_id: str, registry: CurrentRegistry) -> dict[str, Any]:
    """Call an operation off; answers with it. A load is stopped unless others wait for the model, a drain
    ends and the model takes requests again. 409 wrong_state for what has ended or can't be stopped: a model
    that is falling asleep, a process that is being ended."""
    operation = registry.operations.get(operation_id)
    await registry.cancel(operation)
    return operation_view(operation)
