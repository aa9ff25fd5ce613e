"""GET /v1/models: what is served here and how.

Purpose: OpenAI's model objects with the facts of each engine added.
Does not know: how models are loaded.
Invariant: facts that are not known before a model was ready are null.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Depends

from memory_efficient_gpt_server.deps import CurrentServer, require_key
from memory_efficient_gpt_server.models import ServedModel
from memory_efficient_gpt_server.registry.model_view import variant_view
from memory_efficient_gpt_server.registry.owner import Registry

router = APIRouter(dependencies=[Depends(require_key)])

_FACTS: Final = (
    "architecture",
    "tier",
    "tier_reason",
    "dtype",
    "device",
    "max_model_len",
    "vocab_size",
    "quantization",
    "weights_bytes",
    "kv_cache_bytes",
    "kv_cache_dtype",
    "num_kv_blocks",
    "block_size",
    "attention_backend",
    "prefix_cache",
    "notes",
)


@router.get("/v1/models")
async def list_models(server: CurrentServer) -> dict[str, Any]:
    """All models."""
    registry = server.catalog.registry
    return {"object": "list", "data": [_described(model, registry) for model in server.catalog]}


@router.get("/v1/models/{model_id}")
async def get_model(model_id: str, server: CurrentServer) -> dict[str, Any]:
    """One model."""
    return _described(server.catalog.get(model_id), server.catalog.registry)


def _described(model: ServedModel, registry: Registry | None) -> dict[str, Any]:
    engine = model.engine
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "memory-efficient-gpt",
        "aliases": list(model.aliases),
        "state": str(engine.state),
        "reason": engine.reason,
        "generation_defaults": dict(model.generation_defaults),
        **{name: getattr(engine.info, name, None) for name in _FACTS},
        **({} if registry is None else _variants(registry, model.id)),
    }


def _variants(registry: Registry, model_id: str) -> dict[str, Any]:
    """What `optimizations` may choose, and in which state that is."""
    return {
        "any_variant": registry.models[model_id].choices.any,
        "variants": [
            {name: shown[name] for name in ("variant", "quantization", "kv_cache_dtype", "state", "reason")}
            for shown in (variant_view(registry, key) for key in registry.variants(model_id))
        ],
    }
