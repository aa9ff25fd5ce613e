"""Which variant a wish chooses, and what is said to those who can't have theirs."""

from __future__ import annotations

import pytest

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.registry.choice import Choices, Facts, Wish, choose, facts_of
from memory_efficient_gpt_server.registry.variants import VariantKey

OWN = VariantKey("m")
BF16 = Facts("bf16", "bfloat16")
INT4, INT8, KV8 = VariantKey("m", "int4"), VariantKey("m", "int8"), VariantKey("m", kv_cache_dtype="int8")
BOTH = VariantKey("m", "int4", "int8")


def refusal(
    wish: Wish, choices: Choices, facts: Facts = BF16, others: tuple[str, ...] = ()
) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        choose(OWN, facts, choices, wish, others)
    return caught.value


@pytest.mark.parametrize("choices", [Choices(), Choices((INT4,)), Choices(any=True)])
@pytest.mark.parametrize("wish", [Wish(), Wish("bf16"), Wish(None, "bfloat16"), Wish("bf16", "bfloat16")])
def test_what_the_configured_model_does_needs_no_variant(wish: Wish, choices: Choices) -> None:
    assert choose(OWN, BF16, choices, wish) == OWN


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [(Wish("int4"), BOTH), (Wish("int8"), INT8), (Wish(None, "int8"), BOTH), (Wish("int4", "bfloat16"), INT4),
     (Wish("bf16", "int8"), KV8)],
)  # fmt: skip
def test_the_first_listed_variant_that_does_it_is_chosen(wish: Wish, chosen: VariantKey) -> None:
    assert choose(OWN, BF16, Choices((BOTH, INT8, INT4, KV8)), wish) == chosen


def test_the_original_weights_can_be_a_variant_of_a_quantized_model() -> None:
    original = VariantKey("m", "bf16")
    assert choose(OWN, Facts("int4", "bfloat16"), Choices((original,)), Wish("bf16")) == original
    assert choose(OWN, Facts("int4", "bfloat16"), Choices(any=True), Wish("bf16")) == original


def test_any_gives_what_was_asked_for_and_one_key_for_one_thing() -> None:
    free = Choices(any=True)
    assert choose(OWN, BF16, free, Wish("int4")) == choose(OWN, BF16, free, Wish("int4", "bfloat16")) == INT4
    assert choose(OWN, BF16, free, Wish("bf16", "int8")) == choose(OWN, BF16, free, Wish(None, "int8")) == KV8


def test_what_is_not_allowed_is_refused_with_what_would_work() -> None:
    error = refusal(Wish("int4-g128"), Choices((INT4, KV8)))
    assert error.param == "optimizations.quantization"
    assert "m is served as bf16 with a KV cache in bfloat16; int4-g128 was asked for" in str(error)
    assert "as int4 with a KV cache in bfloat16, or bf16 with a KV cache in int8" in str(error)
    error = refusal(Wish(None, "float32"), Choices())
    assert error.param == "optimizations.kv_cache_dtype" and "`variants`" in str(error)
    assert "Model a or b would do." in str(refusal(Wish("int4"), Choices(), others=("a", "b")))


def test_listed_options_are_not_combined_unless_the_operator_did() -> None:
    assert "int4 with a KV cache in int8" in str(refusal(Wish("int4", "int8"), Choices((INT4, KV8))))


def test_a_quantized_checkpoint_has_one_scheme_and_any_kv_cache() -> None:
    fixed, facts = Choices(any=True, weights_fixed=True), Facts("int4", "bfloat16")
    assert choose(OWN, facts, fixed, Wish("int4", "int8")) == KV8
    for scheme in ("int8", "bf16"):
        assert "quantized already, as int4" in str(refusal(Wish(scheme), fixed, facts))


def test_a_variants_facts_are_the_models_own_but_for_what_it_names() -> None:
    assert facts_of(INT4, BF16) == Facts("int4", "bfloat16") and facts_of(KV8, BF16) == Facts("bf16", "int8")
