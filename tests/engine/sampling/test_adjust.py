"""Bias, suppression and penalties against the plain-Python reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch
from memory_efficient_gpt.sampling.adjust import adjust
from tests.engine.sampling.reference import (
    CPU,
    GREEDY,
    chosen,
    logits_of,
    penalties,
    reference_logits,
)


@settings(deadline=None, max_examples=100)
@given(
    penalties,
    st.lists(st.integers(0, 39), max_size=8),
    st.lists(st.integers(0, 39), max_size=8),
    st.sets(st.integers(0, 39), max_size=3),
    st.integers(-1, 39),
    st.integers(0, 10**6),
)
def test_adjusted_logits_match_reference(
    options: dict[str, Any],
    history: list[int],
    outputs: list[int],
    suppress: set[int],
    pending: int,
    seed: int,
) -> None:
    logits = logits_of(3, 40, seed=seed)
    row = SampleRow(SamplingParams(**options), 0, 0, tuple(history), outputs, tuple(suppress))
    rows = [SampleRow(GREEDY, 0, 0), row, SampleRow(SamplingParams(presence_penalty=0.5), 0, 0, (), [1])]
    before = logits.clone()
    adjusted = adjust(logits, SamplingBatch(rows, CPU, torch.tensor([-1, pending, 2])))
    assert torch.equal(logits, before)
    assert torch.equal(adjusted[0], logits[0])
    expected = reference_logits([float(x) for x in logits[1]], row, pending)
    torch.testing.assert_close(adjusted[1], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    expected = reference_logits([float(x) for x in logits[2]], rows[2], 2)
    torch.testing.assert_close(adjusted[2], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(penalties, st.lists(st.integers(0, 39), min_size=1, max_size=12), st.integers(0, 10**6))
def test_pending_token_counts_exactly_as_a_known_one(
    options: dict[str, Any], outputs: list[int], seed: int
) -> None:
    logits = logits_of(1, 40, seed=seed)
    params = SamplingParams(**options)
    known = SamplingBatch([SampleRow(params, 0, 0, (1, 2, 3), outputs)], CPU)
    unread = SamplingBatch(
        [SampleRow(params, 0, 0, (1, 2, 3), outputs[:-1])], CPU, torch.tensor([outputs[-1]])
    )
    assert torch.equal(adjust(logits, known), adjust(logits, unread))


@pytest.mark.parametrize("outputs", [[], [0, 0, 5]])
def test_no_pending_token_changes_nothing(outputs: list[int]) -> None:
    logits = logits_of(1, 40)
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.2)
    rows = [SampleRow(params, 0, 0, (3,), outputs)]
    with_none = adjust(logits, SamplingBatch(rows, CPU, torch.tensor([-1])))
    assert torch.equal(with_none, adjust(logits, SamplingBatch(rows, CPU)))


def test_suppressed_tokens_are_never_chosen() -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0, 0.0]]).expand(40, -1)
    rows = [SampleRow(GREEDY, 0, i, suppress=(0, 2, 0)) for i in range(20)]
    rows += [SampleRow(SamplingParams(logit_bias={2: 100.0}), 0, i, suppress=(0, 2)) for i in range(20)]
    assert set(chosen(logits, rows)) == {1, 3}
    assert set(chosen(logits[:20], rows[:20])) == {1}
