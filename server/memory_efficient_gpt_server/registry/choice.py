"""Which variant of a model a request's wish chooses.

Purpose: the first that does what was asked: the model as configured, then what the operator allows.
Does not know: what is loaded, what fits; checkpoints (it is told how the model is stored).
Invariant: nobody chooses what the operator has not allowed; one wish always chooses the same variant,
whatever is loaded, so that answers don't depend on who else asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.registry.variants import VariantKey

QUANTIZATION_FIELD = "optimizations.quantization"
KV_CACHE_FIELD = "optimizations.kv_cache_dtype"


@dataclass(frozen=True, slots=True)
class Facts:
    """How a variant is served: the scheme of its weights ("bf16" for none), the type of its KV cache."""

    quantization: str = "bf16"
    kv_cache_dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.quantization} with a KV cache in {self.kv_cache_dtype}"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request wants of the variant; None: whatever the model has."""

    quantization: str | None = None
    kv_cache_dtype: str | None = None

    def __bool__(self) -> bool:
        return self != Wish()

    def __str__(self) -> str:
        parts = [self.quantization, self.kv_cache_dtype and f"a KV cache in {self.kv_cache_dtype}"]
        return " with ".join([part for part in parts if part])

    def fulfilled_by(self, facts: Facts) -> bool:
        """Whether a variant that is served so will do."""
        return self.quantization in (None, facts.quantization) and self.kv_cache_dtype in (
            None,
            facts.kv_cache_dtype,
        )


@dataclass(frozen=True, slots=True)
class Choices:
    """What the operator lets requests choose: `listed`, the preferred first, or with `any` all that works.

    weights_fixed: the checkpoint's weights are quantized already, so that no other scheme works.
    """

    listed: tuple[VariantKey, ...] = ()
    any: bool = False
    weights_fixed: bool = False


NO_CHOICES: Final = Choices()
UNQUANTIZED_FACTS: Final = Facts()


def choose(
    key: VariantKey, facts: Facts, choices: Choices, wish: Wish, others: Sequence[str] = ()
) -> VariantKey:
    """The variant for the wish. key, facts: of the model as configured. others: models that would do.

    Raises InvalidRequestError saying why not, and what would work.
    """
    if wish.fulfilled_by(facts):
        return key
    fixed = choices.weights_fixed and wish.quantization not in (None, facts.quantization)
    if choices.any and not fixed:
        kv = None if wish.kv_cache_dtype == facts.kv_cache_dtype else wish.kv_cache_dtype
        scheme = None if wish.quantization == facts.quantization else wish.quantization
        return VariantKey(key.model_id, scheme, kv or "auto")
    for listed in choices.listed:
        if wish.fulfilled_by(facts_of(listed, facts)):
            return listed
    why = f" Its checkpoint is quantized already, as {facts.quantization}." if fixed else ""
    raise InvalidRequestError(
        f"Model {key.model_id} is served as {facts}; {wish} was asked for.{why} "
        f"{_what_works(facts, choices, others)}",
        param=_field(facts, wish),
    )


def facts_of(listed: VariantKey, facts: Facts) -> Facts:
    """How a variant will be served; what it does not name is as in the configured model."""
    kv = facts.kv_cache_dtype if listed.kv_cache_dtype == "auto" else listed.kv_cache_dtype
    return Facts(listed.quantization or facts.quantization, kv)


def _field(facts: Facts, wish: Wish) -> str:
    return KV_CACHE_FIELD if wish.quantization in (None, facts.quantization) else QUANTIZATION_FIELD


def _what_works(facts: Facts, choices: Choices, others: Sequence[str]) -> str:
    listed = [str(facts_of(key, facts)) for key in choices.listed]
    parts = [f"Model {' or '.join(others)} would do."] if others else []
    if listed:
        parts.append(f"It can also be had as {', or '.join(listed)}.")
    if choices.any:
        parts.append("Leave quantization out; only kv_cache_dtype can be chosen.")
    if not parts:
        parts.append("Leave the field out, or ask the administrator to allow it in the model's `variants`.")
    return " ".join(parts)
