"""Which variants of a model its operator lets requests choose.

Purpose: the values of a model's setting `variants`.
Does not know: requests, checkpoints, what is loaded.
Invariant: schemes are written as they print, so that equal variants are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict

from memory_efficient_gpt.config import KVCacheDtype
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.scheme import parse_scheme

_FIELDS: Final = ("quantization", "kv_cache_dtype")


class VariantSettings(BaseModel):
    """What a variant has instead of its model's own; None and "auto" leave that as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantization: str | None = None
    kv_cache_dtype: KVCacheDtype = "auto"


def _variants(value: Any) -> Any:
    """`any`, or a list of scheme names and of mappings. Raises ValueError with a sentence of ours."""
    if value == "any":
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be any, or a list of schemes and mappings, got {value!r:.80}")
    variants = tuple(map(_variant, value))
    if len(set(variants)) < len(variants):
        raise ValueError("lists one variant twice; give each once")
    return variants


def _variant(value: Any) -> VariantSettings:
    if isinstance(value, VariantSettings):
        return value
    if isinstance(value, str):
        value = {"quantization": value}
    if not isinstance(value, Mapping) or not value or not set(value) <= set(_FIELDS):
        raise ValueError(
            f"has {value!r:.80}; each must be a scheme such as int4, or a mapping of {' and '.join(_FIELDS)}"
        )
    scheme, kv = value.get("quantization"), value.get("kv_cache_dtype", "auto")
    if not isinstance(scheme, str | None):
        raise ValueError(f"has the quantization {scheme!r:.80}; it must be the name of a scheme")
    if kv not in get_args(KVCacheDtype):
        raise ValueError(f"has the kv_cache_dtype {kv!r:.80}; use {', '.join(get_args(KVCacheDtype))}")
    variant = VariantSettings(quantization=_scheme(scheme), kv_cache_dtype=cast("KVCacheDtype", kv))
    if variant == VariantSettings():
        raise ValueError(f"has {value!r:.80}, which says nothing; name a quantization or a kv_cache_dtype")
    return variant


def _scheme(name: str | None) -> str | None:
    try:
        return None if name is None else str(parse_scheme(name))
    except ConfigError as error:
        raise ValueError(" ".join(error.problems)) from error


Variants = Annotated[Literal["any"] | tuple[VariantSettings, ...], BeforeValidator(_variants)]
