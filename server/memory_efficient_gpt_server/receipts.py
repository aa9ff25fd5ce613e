"""What really served a request, and what that cost: the `receipt` of an answer.

Purpose: one JSON object from the engine's facts and the measured costs of the request's prompts.
Does not know: how costs are measured (memory_efficient_gpt.kv_meter), HTTP.
Invariant: nothing is estimated: what was not measured is null.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.request import Cost


@dataclass(frozen=True, slots=True)
class Serving:
    """What served a request. variant: its name; load_s: how long the request waited for it."""

    model_id: str
    variant: str
    info: EngineInfo
    load_s: float


def receipt(
    serving: Serving, costs: Collection[Cost], num_prompts: int, cached_tokens: int
) -> dict[str, Any]:
    """costs: of those prompts of which any is known. Each prompt is a request of its own to the engine."""
    info, complete = serving.info, len(costs) == num_prompts
    return {
        "model": serving.model_id,
        "variant": serving.variant,
        "quantization": info.quantization,
        "dtype": info.dtype,
        "kv_cache_dtype": info.kv_cache_dtype,
        "attention_backend": info.attention_backend,
        "device": info.device,
        "weights_bytes": info.weights_bytes,
        "cached_tokens": cached_tokens,
        "kv_peak_bytes": _sum([cost.kv_peak_bytes for cost in costs]) if complete else None,
        "kv_byte_seconds": _sum([cost.kv_byte_seconds for cost in costs]) if complete else None,
        "queue_ms": _ms(max(cost.queue_s for cost in costs)) if complete else None,
        "load_ms": _ms(serving.load_s),
        "resumed": any(cost.resumed for cost in costs),
    }


def later(one: Cost | None, other: Cost) -> Cost:
    """Costs only grow; news of a request's sequences may be read in another order than they came."""
    if one is None or other.resumed > one.resumed:
        return other
    return max(one, other, key=lambda cost: cost.kv_byte_seconds or 0.0)


def _sum(values: list[int | None] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
