"""What a request asks of how it is computed, against how its model is served.

Purpose: take what is so, refuse what is not, and say what would do.
Does not know: engines, routes, how a model came to be served so.
Invariant: a wish is fulfilled or refused, never ignored; `auto` and what is left out wish for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import ConfigError, InvalidRequestError
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt_server.schemas import Optimizations

_BACKENDS: Final[dict[str, str]] = {"sdpa": "torch", "flash": "flash"}
"""What a request calls attention, and the backend that computes it."""


def check_optimizations(
    wanted: Optimizations, model_id: str, info: EngineInfo, others: Iterable[tuple[str, EngineInfo]]
) -> None:
    """Raise InvalidRequestError, naming the field, for what the model is not served with.

    others: ids and facts of the server's other models, for what would do.
    """
    if wanted.quantization not in (None, "auto"):
        name = _scheme_name(wanted.quantization)
        if name != _stored(info):
            served = [other for other, facts in others if _stored(facts) == name]
            raise _refusal("quantization", model_id, f"stored as {_stored(info)}", name, served)
    if wanted.kv_cache_dtype not in (None, "auto", info.kv_cache_dtype):
        served = [other for other, facts in others if facts.kv_cache_dtype == wanted.kv_cache_dtype]
        served_with = f"served with a KV cache in {info.kv_cache_dtype}"
        raise _refusal("kv_cache_dtype", model_id, served_with, str(wanted.kv_cache_dtype), served)
    attention = wanted.attention
    if attention not in (None, "auto") and _BACKENDS.get(attention) != info.attention_backend:
        computed = f"served with attention by {info.attention_backend}"
        raise _refusal("attention", model_id, computed, attention, [])


def _scheme_name(name: str | None) -> str:
    try:
        return str(parse_scheme(name or ""))
    except ConfigError as error:
        raise InvalidRequestError(str(error.problems[0]), param="optimizations.quantization") from error


def _stored(info: EngineInfo) -> str:
    return info.quantization or "bf16"


def _refusal(field: str, model_id: str, served: str, wanted: str, others: list[str]) -> InvalidRequestError:
    instead = f"; {', '.join(others)} would do" if others else ""
    return InvalidRequestError(
        f"Model {model_id} is {served}; {wanted} was asked for{instead}. Leave the field out, or ask the "
        "administrator for a model configured so.",
        param=f"optimizations.{field}",
    )
