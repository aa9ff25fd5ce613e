"""Sampling parameters are checked before anything else sees them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.request import SamplingParams

VOCAB = 100

WRONG: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", True),
    ("temperature", "1"),
    ("temperature", 10**400),
    ("top_p", 1.01),
    ("min_p", -1),
    ("top_k", 0),
    ("top_k", 10**23),
    ("top_k", 2.0),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -math.inf),
    ("seed", 2**63),
    ("seed", True),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("max_tokens", 0),
    ("max_tokens", -(10**30)),
    ("min_tokens", -1),
    ("n", 0),
    ("n", 9),
    ("stop", 5),
    ("stop", ("",)),
    ("stop", ("x" * 257,)),
    ("stop", tuple("abcde")),
    ("stop_token_ids", 5),
    ("stop_token_ids", (VOCAB,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (1,) * 65),
    ("logit_bias", [1]),
    ("logit_bias", {VOCAB: 1.0}),
    ("ignore_eos", None),
    ("ignore_eos", 1),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(301), 1.0)),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: repr(v)[:30])
def test_wrong_value_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value}).validate(VOCAB)
    assert caught.value.param == field
    assert field.replace("_", " ").split()[0] in caught.value.message.replace("_", " ")
    assert len(caught.value.message) < 200


def test_limits_themselves_are_allowed() -> None:
    SamplingParams(
        temperature=2.0, top_k=1, top_p=0.0, min_p=1.0, repetition_penalty=10.0, presence_penalty=-2.0,
        frequency_penalty=2.0, seed=-(2**63), logprobs=20, prompt_logprobs=0, max_tokens=1, min_tokens=1, n=8,
        stop=("x" * 256,), stop_token_ids=(0, VOCAB - 1), logit_bias={0: -100.0, VOCAB - 1: 100.0},
    ).validate(VOCAB)  # fmt: skip


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens must be an integer from 0 to 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4).validate(VOCAB)


def test_tiny_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0.005).greedy and SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.02).greedy


def test_none_stands_for_nothing_in_lists_and_maps() -> None:
    nothing: Any = None
    params = SamplingParams(stop=nothing, stop_token_ids=nothing, logit_bias=nothing)
    params.validate(VOCAB)
    assert params == SamplingParams()


def test_a_wrong_key_of_a_bias_is_called_a_token_id() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"the keys of logit_bias must be token ids.*to 99; got 100"
    ):
        SamplingParams(logit_bias={100: 1.0}).validate(100)
