"""/admin: load and unload models, put them to sleep, ask what would fit, see who has which memory.

Purpose: the registry's wishes and views over HTTP, for the holder of the admin key.
Does not know: how models are loaded, who is evicted.
Invariant: an operation is answered at once if it is done or refused at once, else with 202 unless asked to
wait; it goes on whether or not anybody waits, and its id tells how it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from memory_efficient_gpt.errors import InvalidRequestError, ModelNotFoundError
from memory_efficient_gpt_server.admin_schemas import (
    LoadBody,
    PlanBody,
    PlannedLoadBody,
    SleepBody,
    UnloadBody,
)
from memory_efficient_gpt_server.deps import (
    ADMIN_ONLY,
    CurrentServer,
    Server,
    body_schema,
    json_body,
    known_query,
)
from memory_efficient_gpt_server.errors import NoMemoryBudgetError
from memory_efficient_gpt_server.optimizations import wish_of
from memory_efficient_gpt_server.registry.events import UnloadMode
from memory_efficient_gpt_server.registry.model_view import model_view
from memory_efficient_gpt_server.registry.operation_view import operation_view
from memory_efficient_gpt_server.registry.operations import Operation
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.plan_view import joint_plan_view, ledger_view, plan_view
from memory_efficient_gpt_server.registry.variants import VariantKey

router = APIRouter(dependencies=ADMIN_ONLY)


def registry_of(server: CurrentServer) -> Registry:
    """The server's registry. Raises NoMemoryBudgetError."""
    if server.catalog.registry is None:
        raise NoMemoryBudgetError(
            "This server has no memory budget: all its models are loaded at start and stay. Set "
            "memory_budget_bytes to load and unload models."
        )
    return server.catalog.registry


CurrentRegistry = Annotated[Registry, Depends(registry_of)]


@router.get("/admin/models")
async def list_models(registry: CurrentRegistry) -> dict[str, Any]:
    """All models as the registry sees them."""
    return {"models": [model_view(registry, model.key) for model in registry.models.values()]}


@router.get("/admin/models/{model_id}")
async def get_model(model_id: str, registry: CurrentRegistry) -> dict[str, Any]:
    """One model."""
    return model_view(registry, registry.hosted(model_id).key)


@router.post("/admin/models/{model_id}/load", openapi_extra=body_schema(LoadBody))
async def load_model(
    request: Request,
    model_id: str,
    server: CurrentServer,
    registry: CurrentRegistry,
    body: Annotated[LoadBody, Depends(json_body(LoadBody, optional=True))],
) -> Response:
    """Load a model for no request. With `evict: never` it is loaded only if nobody must leave or sleep for
    it, else 409 eviction_needed with the plan."""
    key = await registry.choose(model_id, wish_of(body.optimizations))
    operation = await registry.load(key, may_evict=body.evict == "auto")
    return await _answer(request, server, registry, key, operation, wait=body.wait)


@router.post("/admin/models/{model_id}/unload", openapi_extra=body_schema(UnloadBody))
async def unload_model(
    request: Request,
    model_id: str,
    server: CurrentServer,
    registry: CurrentRegistry,
    body: Annotated[UnloadBody, Depends(json_body(UnloadBody, optional=True))],
) -> Response:
    """Unload a model."""
    key = await registry.choose(model_id, wish_of(body.optimizations))
    operation = await registry.unload(key, UnloadMode(body.mode), body.deadline_s)
    return await _answer(request, server, registry, key, operation, wait=body.wait)


@router.post("/admin/models/{model_id}/sleep", openapi_extra=body_schema(SleepBody))
async def put_model_to_sleep(
    request: Request,
    model_id: str,
    server: CurrentServer,
    registry: CurrentRegistry,
    body: Annotated[SleepBody, Depends(json_body(SleepBody, optional=True))],
) -> Response:
    """Let an idle model give memory back and keep its process."""
    key = await registry.choose(model_id, wish_of(body.optimizations))
    operation = await registry.sleep(key)
    return await _answer(request, server, registry, key, operation, wait=body.wait)


@router.post("/admin/models/{model_id}/wake", openapi_extra=body_schema(SleepBody))
async def wake_model(
    request: Request,
    model_id: str,
    server: CurrentServer,
    registry: CurrentRegistry,
    body: Annotated[SleepBody, Depends(json_body(SleepBody, optional=True))],
) -> Response:
    """Wake a sleeping model for no request."""
    key = await registry.choose(model_id, wish_of(body.optimizations))
    operation = await registry.wake(key)
    return await _answer(request, server, registry, key, operation, wait=body.wait)


@router.post("/admin/plan", openapi_extra=body_schema(PlanBody))
async def plan_load(
    registry: CurrentRegistry, body: Annotated[PlanBody, Depends(json_body(PlanBody))]
) -> dict[str, Any]:
    """What loading a model would mean now: whether it fits, who would leave, when it would be ready, which
    other variants would fit. With `loads` the same of several models together: each with its bytes and
    whether it fits beside those before it, and what would fit instead. Changes nothing."""
    if body.loads is not None:
        return joint_plan_view(await registry.plan_together(await _chosen(registry, body.loads)))
    assert body.model is not None, "the schema wants one of them"
    key = await registry.choose(body.model, wish_of(body.optimizations))
    return {"model": key.model_id, "variant": str(key), **plan_view(await registry.plan(key))}


async def _chosen(registry: Registry, loads: Sequence[PlannedLoadBody]) -> list[VariantKey]:
    """The variants, each once. Raises what `choose` raises, with the field's place in the list."""
    keys: list[VariantKey] = []
    for number, load in enumerate(loads):
        try:
            key = await registry.choose(load.model, wish_of(load.optimizations))
        except (InvalidRequestError, ModelNotFoundError) as error:
            error.param = f"loads[{number}].{error.param or 'model'}"
            raise
        if key in keys:
            raise InvalidRequestError(
                f"loads[{number}] is {key}, as loads[{keys.index(key)}] is. Give each variant once.",
                param=f"loads[{number}]",
            )
        keys.append(key)
    return keys


@router.get("/admin/memory")
async def memory(registry: CurrentRegistry) -> dict[str, Any]:
    """Budgets, and who has what."""
    return ledger_view(registry.state.ledger)


async def _answer(
    request: Request,
    server: Server,
    registry: Registry,
    key: VariantKey,
    operation: Operation,
    *,
    wait: bool,
) -> Response:
    """200 with the variant once the operation is done, 202 while it goes on. Raises the refusal."""
    wait = wait or known_query(request) is True
    if wait:
        async with server.lifecycle.running(request.receive, server.settings.request_timeout_s):
            await operation
    if operation.done():
        operation.result()
    done = operation.done()
    view = model_view(registry, key) | {"operation": operation_view(operation)}
    headers = None if done else {"location": f"/admin/operations/{operation.id}"}
    return Response(to_json(view), 200 if done else 202, headers, "application/json")
