"""transformers' option names, the checkpoint's recommendations, and the engine's parameters."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.generation_options import own_names, sampling_params
from memory_efficient_gpt.request import SamplingParams

RECOMMENDED: dict[str, Any] = dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=100)


def params(*, room: int = 1000, recommended: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    return sampling_params(options, GenerationConfig(**(recommended or {})), room=room)


def test_nothing_given_and_nothing_recommended_is_greedy() -> None:
    assert params() == SamplingParams(temperature=0.0, max_tokens=256)
    assert sampling_params({}, None, room=9) == SamplingParams(temperature=0.0, max_tokens=9)


def test_the_checkpoint_recommends_and_the_caller_decides() -> None:
    assert params(recommended=RECOMMENDED) == SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100)
    assert params(recommended=RECOMMENDED, temperature=0.5, top_k=7, max_new_tokens=3) == SamplingParams(
        temperature=0.5, top_p=0.95, top_k=7, max_tokens=3
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=100)
    assert params(recommended=RECOMMENDED, do_sample=False) == greedy
    assert params(recommended=RECOMMENDED, temperature=0) == greedy


def test_a_sampling_option_means_sampling() -> None:
    assert params(top_p=0.9) == SamplingParams(top_p=0.9, max_tokens=256)
    assert params(do_sample=True, seed=1) == SamplingParams(seed=1, max_tokens=256)
    assert params(seed=1) == SamplingParams(temperature=0.0, seed=1, max_tokens=256)
    assert params(top_k=0, do_sample=True) == SamplingParams(max_tokens=256)


def test_a_penalty_holds_for_greedy_texts_too() -> None:
    recommended = {"do_sample": False, "repetition_penalty": 1.1}
    assert params(recommended=recommended).repetition_penalty == 1.1


def test_none_means_not_given() -> None:
    assert params(temperature=None, max_new_tokens=None, stop_strings=None, seed=None) == params()


def test_default_lengths_fit_the_context_and_given_ones_are_not_touched() -> None:
    assert params(room=10).max_tokens == 10
    assert params(room=-3).max_tokens == 1  # the engine refuses the prompt
    assert params(room=10, max_new_tokens=50).max_tokens == 50


@pytest.mark.parametrize(
    ("param", "message", "shown_param", "shown"),
    [
        ("max_tokens", "max_tokens must be 1, not max_tokens_x", "max_new_tokens",
         "max_new_tokens must be 1, not max_tokens_x"),
        ("stop", "stop must be text: do not stop", "stop_strings", "stop_strings must be text: do not stop"),
        ("prompt", "the prompt is empty", "inputs", "the prompt is empty"),
        ("top_p", "top_p is off", "top_p", "top_p is off"),
        (None, "something", None, "something"),
    ],
)  # fmt: skip
def test_complaints_name_the_callers_options(
    param: str | None, message: str, shown_param: str | None, shown: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught, own_names():
        raise InvalidRequestError(message, param=param)
    assert (caught.value.param, caught.value.message) == (shown_param, shown)
