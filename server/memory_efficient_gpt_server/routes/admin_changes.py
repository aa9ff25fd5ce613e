"""PATCH of models and budgets, models that are registered and removed while the server runs.

Purpose: what administrators change, over HTTP, for the holder of the admin key.
Does not know: what follows from a change.
Invariant: a change is whole or refused; all are forgotten when the server ends, as settings are its file's.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from memory_efficient_gpt_server.admin_schemas import PatchMemoryBody, PatchModelBody
from memory_efficient_gpt_server.deps import ADMIN_ONLY, CurrentServer, body_schema, json_body
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.registration import offer, prepare, rescan, unregister
from memory_efficient_gpt_server.registry.changes import change_budget, change_model
from memory_efficient_gpt_server.registry.model_view import model_view
from memory_efficient_gpt_server.registry.plan_view import ledger_view
from memory_efficient_gpt_server.routes.admin import CurrentRegistry

router = APIRouter(dependencies=ADMIN_ONLY)


@router.patch("/admin/models/{model_id}", openapi_extra=body_schema(PatchModelBody))
async def patch_model(
    model_id: str,
    registry: CurrentRegistry,
    body: Annotated[PatchModelBody, Depends(json_body(PatchModelBody))],
) -> dict[str, Any]:
    """Change a model's settings until the server ends; answers with the model. What follows, follows at once:
    a model whose ttl_s is over is unloaded, one with more KV memory than its hard limit gives back what it
    can spare. 409 kv_limit_too_small with figures for a hard limit below what one request of full length
    needs."""
    await change_model(registry, model_id, body.settings)
    return model_view(registry, registry.hosted(model_id).key)


@router.patch("/admin/memory", openapi_extra=body_schema(PatchMemoryBody))
async def patch_memory(
    registry: CurrentRegistry, body: Annotated[PatchMemoryBody, Depends(json_body(PatchMemoryBody))]
) -> dict[str, Any]:
    """Give a device another budget until the server ends; answers as GET /admin/memory. If it is too small,
    idle models leave at once and those in use finish their requests first. 409 budget_too_small with figures
    below what pinned models hold."""
    await change_budget(registry, body.device, body.budget_bytes)
    return ledger_view(registry.state.ledger)


@router.post("/admin/models", status_code=201, openapi_extra=body_schema(ModelSettings))
async def register_model(
    request: Request,
    server: CurrentServer,
    registry: CurrentRegistry,
    body: Annotated[ModelSettings, Depends(json_body(ModelSettings))],
) -> Response:
    """Register a model until the server ends: a bundled one, a folder of models_dir, or a hub id (which is
    downloaded now). The fields are those of the setting `models`. It is loaded when it is first asked for."""
    async with server.lifecycle.running(request.receive, server.settings.request_timeout_s):
        model = await prepare(server.catalog, registry, body, server.settings.models_dir)
    await offer(server.catalog, registry, model)
    view = to_json(model_view(registry, registry.hosted(body.id).key))
    return Response(view, 201, {"location": f"/admin/models/{body.id}"}, "application/json")


@router.delete("/admin/models/{model_id}")
async def delete_model(model_id: str, server: CurrentServer, registry: CurrentRegistry) -> dict[str, Any]:
    """Offer a model no more; its files stay. 409 model_busy unless it is unloaded. One of the server's
    settings is back when the server is started again."""
    return {"id": await unregister(server.catalog, registry, model_id), "removed": True}


@router.post("/admin/rescan")
async def rescan_folder(server: CurrentServer, registry: CurrentRegistry) -> dict[str, Any]:
    """Register what is new in models_dir. `missing`: models whose folders are gone, which stay registered;
    `problems`: folders that can't be served, and why."""
    found = await rescan(server.catalog, registry, server.settings.models_dir)
    return {
        "added": [model_view(registry, registry.hosted(model_id).key) for model_id in found.added],
        "missing": list(found.missing),
        "problems": list(found.problems),
    }
