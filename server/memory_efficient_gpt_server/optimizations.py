"""What a request asks of how it is computed, against how its model is served.

Purpose: take what is so, refuse what is not, and say what would do.
Does not know: engines, routes, how a model came to be served so, which variants may be chosen.
Invariant: a wish is fulfilled or refused, never ignored; `auto` and what is left out wish for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, get_args

from memory_efficient_gpt.config import KVCacheDtype
from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import ConfigError, InvalidRequestError
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt_server.registry.choice import KV_CACHE_FIELD, QUANTIZATION_FIELD, Wish
from memory_efficient_gpt_server.schemas import LoadOptions, Optimizations

_BACKENDS: Final[dict[str, str]] = {"sdpa": "torch", "flash": "flash"}
"""What a request calls attention, and the backend that computes it."""


def wish_of(options: LoadOptions | None) -> Wish:
    """What is asked of the variant. Raises InvalidRequestError for what has no such name."""
    if options is None:
        return Wish()
    scheme, kv = options.quantization, options.kv_cache_dtype
    if kv is not None and kv not in get_args(KVCacheDtype):
        raise InvalidRequestError(
            f"kv_cache_dtype must be {', '.join(get_args(KVCacheDtype))}, got {kv[:40]!r}.",
            param=KV_CACHE_FIELD,
        )
    return Wish(
        quantization=None if scheme in (None, "auto") else _scheme_name(scheme),
        kv_cache_dtype=None if kv == "auto" else kv,
    )


def check_optimizations(
    wanted: Optimizations, model_id: str, info: EngineInfo, others: Iterable[tuple[str, EngineInfo]]
) -> None:
    """Raise InvalidRequestError, naming the field, for what the model is not served with.

    others: ids and facts of the server's other models, for what would do.
    """
    wish = wish_of(wanted)
    if wish.quantization not in (None, _stored(info)):
        served = [other for other, facts in others if _stored(facts) == wish.quantization]
        stored = f"stored as {_stored(info)}"
        raise _refusal(QUANTIZATION_FIELD, model_id, stored, str(wish.quantization), served)
    if wish.kv_cache_dtype not in (None, info.kv_cache_dtype):
        served = [other for other, facts in others if facts.kv_cache_dtype == wish.kv_cache_dtype]
        served_with = f"served with a KV cache in {info.kv_cache_dtype}"
        raise _refusal(KV_CACHE_FIELD, model_id, served_with, str(wish.kv_cache_dtype), served)
    attention = wanted.attention
    if attention not in (None, "auto") and _BACKENDS.get(attention) != info.attention_backend:
        computed = f"served with attention by {info.attention_backend}"
        raise InvalidRequestError(
            f"Model {model_id} is {computed}; {attention} was asked for. Leave the field out.",
            param="optimizations.attention",
        )


def check_prefix_cache(field: str | None, model_id: str, info: EngineInfo) -> None:
    """Raise InvalidRequestError if `field` asks for a prefix cache and the model has none."""
    if field is not None and not info.prefix_cache:
        raise InvalidRequestError(
            f"Model {model_id} has no prefix cache, which {field} asks for. Leave the field out.",
            param=field,
        )


def _scheme_name(name: str | None) -> str:
    try:
        return str(parse_scheme(name or ""))
    except ConfigError as error:
        raise InvalidRequestError(str(error.problems[0]), param=QUANTIZATION_FIELD) from error


def _stored(info: EngineInfo) -> str:
    return info.quantization or "bf16"


def _refusal(field: str, model_id: str, served: str, wanted: str, others: list[str]) -> InvalidRequestError:
    instead = f"; {', '.join(others)} would do" if others else ""
    return InvalidRequestError(
        f"Model {model_id} is {served}; {wanted} was asked for{instead}. Leave the field out, or ask the "
        "administrator for it: a server with memory_budget_bytes can load what a model's `variants` allow.",
        param=field,
    )
