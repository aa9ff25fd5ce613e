"""Filters and draws against the plain-Python reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, sample
from tests.engine.sampling.reference import (
    CPU,
    chi_square,
    chi_square_limit,
    chosen,
    distinct_logits,
    filters,
    grid_draws,
    logits_of,
    near_a_decision,
    reference_weights,
)


@settings(deadline=None, max_examples=150)
@given(filters, st.integers(0, 10**6), st.integers(2, 60))
def test_draw_matches_reference(options: dict[str, Any], seed: int, size: int) -> None:
    logits, params = distinct_logits(size, seed), SamplingParams(**options)
    values = [float(x) for x in logits]
    assume(not near_a_decision(values, params))
    weights = reference_weights(values, params)
    total = sum(weights)
    for u, token in grid_draws(logits, SampleRow(params, 0, 0), 257):
        below, above = sum(weights[:token]) / total, sum(weights[: token + 1]) / total
        assert weights[token] > 0
        assert below - 1e-5 <= u <= above + 1e-5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.5, top_k=30, top_p=0.7, min_p=0.02),
    ],
)
def test_seeded_draws_follow_the_distribution(params: SamplingParams) -> None:
    count = 20_000
    logits = logits_of(40, seed=7, scale=1.0)
    weights = reference_weights([float(x) for x in logits], params)
    tokens = chosen(logits.expand(count, -1), [SampleRow(params, 11, i) for i in range(count)])
    kept = [token for token, weight in enumerate(weights) if weight > 0]
    assert set(tokens) <= set(kept)
    observed = [tokens.count(token) for token in kept]
    expected = [count * weights[token] / sum(weights) for token in kept]
    assert chi_square(observed, expected) < chi_square_limit(len(kept) - 1)


def test_tokens_of_equal_weight_stay_together() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.55), SamplingParams(top_k=2, top_p=0.55)):
        drawn = {token for _, token in grid_draws(logits, SampleRow(params, 0, 0), 500)}
        assert drawn == {1, 2, 3, 4}


def test_top_k_beyond_the_vocabulary_cuts_nothing() -> None:
    logits = logits_of(3, 20)
    free = [SampleRow(SamplingParams(), i, i) for i in range(3)]
    wide = [SampleRow(SamplingParams(top_k=2**31 - 1), i, i) for i in range(3)]
    assert chosen(logits, free) == chosen(logits, wide)


def test_extreme_uniforms_draw_the_first_and_the_last_possible_token() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]]).expand(2, -1)
    batch = SamplingBatch([SampleRow(SamplingParams(), 0, 0)] * 2, CPU)
    assert batch.draw is not None
    ends = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    batch.draw = replace(batch.draw, uniform=ends)
    assert sample(logits, batch).token_ids.tolist() == [1, 2]


@pytest.mark.parametrize("size", [8191, 8192, 16384, 20001, 300_000])
def test_largest_uniform_stays_within_any_vocabulary(size: int) -> None:
    batch = SamplingBatch([SampleRow(SamplingParams(), 0, 0)], CPU)
    assert batch.draw is not None
    batch.draw = replace(batch.draw, uniform=torch.tensor([[1.0 - 2.0**-53]], dtype=torch.float64))
    assert sample(torch.zeros(1, size), batch).token_ids.tolist() == [size - 1]


def test_lowest_temperature_with_huge_logits_stays_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 1e38, 3e38]]).expand(50, -1)
    rows = [SampleRow(SamplingParams(temperature=0.01), 3, i) for i in range(50)]
    sampled = sample(logits, SamplingBatch(rows, CPU))
    assert sampled.ok.all()
    assert set(sampled.token_ids.tolist()) == {0, 3}
