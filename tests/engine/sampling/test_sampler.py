"""A batch's rows: chosen rightly, and each as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, sample
from tests.engine.sampling.reference import (
    CPU,
    GREEDY,
    chosen,
    filters,
    logits_of,
    params_of,
    penalties,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_most_likely_token(dtype: torch.dtype) -> None:
    logits = logits_of(5, 301).to(dtype)
    params = SamplingParams(temperature=0.009)
    assert chosen(logits, [SampleRow(params, 0, 0)] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=0.0, temperature=2.0)])
def test_filters_that_leave_one_token_are_greedy_even_with_ties(params: SamplingParams) -> None:
    logits = torch.zeros(64, 10)
    assert set(chosen(logits, [SampleRow(params, 1, i) for i in range(64)])) == {0}


mixed_params = st.one_of(
    st.just(GREEDY),
    filters.map(params_of),
    penalties.map(params_of),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(mixed_params, min_size=2, max_size=9), st.integers(0, 10**6), st.randoms())
def test_token_is_the_same_alone_and_anywhere_in_any_batch(
    params: list[SamplingParams], seed: int, random: Any
) -> None:
    logits = logits_of(len(params), 333, seed=seed)
    rows = [SampleRow(p, seed + i, i, (1, 2), [3, 4, 3]) for i, p in enumerate(params)]
    alone = [chosen(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)
    assert chosen(logits[order], [rows[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_with_unusable_logits_fails_alone(bad: float) -> None:
    logits = logits_of(8, 50)
    params = [
        GREEDY,
        SamplingParams(logprobs=3),
        SamplingParams(top_p=0.9, top_k=9),
        SamplingParams(min_p=0.1),
    ]
    rows = [SampleRow(params[i % 4], 5, i) for i in range(8)]
    good = chosen(logits, rows)
    broken = logits.clone()
    broken[:4, 17] = bad
    sampled = sample(broken, SamplingBatch(rows, CPU))
    assert sampled.ok.tolist() == [False] * 4 + [True] * 4
    assert sampled.token_ids.tolist() == [0] * 4 + good[4:]


def test_row_of_nothing_but_minus_infinity_fails() -> None:
    logits = torch.full((2, 9), -math.inf)
    sampled = sample(logits, SamplingBatch([SampleRow(GREEDY, 0, 0), SampleRow(SamplingParams(), 0, 0)], CPU))
    assert sampled.ok.tolist() == [False, False]


def test_suppression_does_not_hide_a_nan() -> None:
    logits = torch.tensor([[1.0, math.nan, 2.0]])
    assert sample(logits, SamplingBatch([SampleRow(GREEDY, 0, 0, suppress=(1,))], CPU)).ok.tolist() == [False]


def test_row_whose_every_possible_token_is_suppressed_fails() -> None:
    logits = torch.tensor([[1.0, -math.inf]])
    assert sample(logits, SamplingBatch([SampleRow(GREEDY, 0, 0, suppress=(0,))], CPU)).ok.tolist() == [False]


def every_feature() -> list[SampleRow]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 4},
        {"top_k": 5, "top_p": 0.9},
        {"top_p": 0.7, "min_p": 0.1},
        {"top_k": 3, "logit_bias": {3: 4.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logprobs": 0},
        {},
    ]
    return [SampleRow(SamplingParams(**o), i, i, (1, 2), [2, 3, 3], (7,)) for i, o in enumerate(options)]


def test_no_step_needs_a_value_on_the_host() -> None:
    """On the meta device there are no values: whatever would read one raises."""
    meta = torch.device("meta")
    rows = every_feature()
    pending = torch.empty(len(rows), dtype=torch.int64, device=meta)
    sampled = sample(torch.empty(len(rows), 97, device=meta), SamplingBatch(rows, meta, pending))
    assert sampled.token_ids.shape == sampled.ok.shape == (len(rows),)
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_ids.shape == (2, 4)


@pytest.fixture
def forbid_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_chooses_the_same_tokens_without_waiting(request: pytest.FixtureRequest) -> None:
    rows = every_feature() * 8
    logits = logits_of(len(rows), 5000)
    expected = sample(logits, SamplingBatch(rows, CPU))
    device = torch.device("cuda")
    on_device = logits.to(device)
    pending = torch.full((len(rows),), -1, device=device)
    request.getfixturevalue("forbid_waiting")
    sampled = sample(on_device, SamplingBatch(rows, device, pending)).to_host()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert sampled.token_ids.tolist() == expected.token_ids.tolist()
    assert sampled.ok.all()
