"""What operators ask: is it alive, may it get traffic, what are its numbers, what is this.

Purpose: /livez, /readyz, /metrics, / and the API's description.
Does not know: how anything it reports came about.
Invariant: ready means that a request sent now would be computed; open routes tell nothing about the machine.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from memory_efficient_gpt import __version__
from memory_efficient_gpt_server.deps import CurrentServer, open_to_all, require_key, require_metrics_access

open_router = APIRouter(dependencies=[Depends(open_to_all)])
metrics_router = APIRouter(dependencies=[Depends(require_metrics_access)])
about_router = APIRouter(dependencies=[Depends(require_key)])


@open_router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@open_router.get("/readyz")
async def readyz(server: CurrentServer) -> Response:
    """200 if every model takes requests (or is loaded for them), else 503 and the reasons."""
    reasons = [reason for model in server.catalog if (reason := model.why_not_ready())]
    if server.lifecycle.draining:
        reasons.insert(0, "the server is shutting down")
    answer = {"status": "not ready" if reasons else "ready", "reasons": reasons}
    headers = {"retry-after": "1"} if reasons else None
    return Response(to_json(answer), 503 if reasons else 200, headers, "application/json")


@metrics_router.get("/metrics")
async def metrics(server: CurrentServer) -> Response:
    """Prometheus' text format."""
    return Response(server.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")


@about_router.get("/")
async def about(server: CurrentServer) -> dict[str, Any]:
    """Name, version and where to go."""
    return {
        "name": "Memory-Efficient GPT",
        "version": __version__,
        "models": [model.id for model in server.catalog],
        "endpoints": {
            "completions": "POST /v1/completions",
            "chat": "POST /v1/chat/completions",
            "models": "GET /v1/models",
            "tokenize": "POST /v1/tokenize",
            "detokenize": "POST /v1/detokenize",
            "alive": "GET /livez",
            "ready": "GET /readyz",
            "metrics": "GET /metrics",
            "description": "GET /openapi.json",
        },
    }


@about_router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    """The API's description, for tools that read OpenAPI."""
    schema: dict[str, Any] = request.app.openapi()
    return schema
