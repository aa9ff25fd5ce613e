"""Log probabilities are of the raw distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, prompt_logprobs, sample
from memory_efficient_gpt.sampling.logprobs import LEAST_LOGPROB, gather_logprobs
from tests.engine.sampling.reference import (
    CPU,
    GREEDY,
    logits_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_distribution(dtype: torch.dtype) -> None:
    logits = logits_of(4, 60).to(dtype)
    changed = SamplingParams(
        temperature=0.5, top_k=3, logit_bias={4: 50.0}, frequency_penalty=1.0, logprobs=2
    )
    rows = [
        SampleRow(replace(GREEDY, logprobs=5), 0, 0),
        SampleRow(GREEDY, 0, 0),
        SampleRow(changed, 0, 0, (), [1, 2]),
        SampleRow(SamplingParams(logprobs=0), 4, 0),
    ]
    sampled = sample(logits, SamplingBatch(rows, CPU)).to_host()
    expected = logits.double().log_softmax(-1)
    entries = sampled.token_logprobs()
    assert entries[1] is None
    for number, k in ((0, 5), (2, 2), (3, 0)):
        entry = entries[number]
        assert entry is not None
        assert entry.token_id == int(sampled.token_ids[number])
        assert entry.logprob == pytest.approx(float(expected[number, entry.token_id]), abs=1e-5)
        assert [p for _, p in entry.top] == pytest.approx(expected[number].topk(k).values.tolist(), abs=1e-5)
        assert all(p == pytest.approx(float(expected[number, t]), abs=1e-5) for t, p in entry.top)


def test_impossible_tokens_have_the_least_logprob() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    tensors = prompt_logprobs(logits, torch.tensor([1]), 3)
    entry = tensors.entries()[0]
    assert entry.logprob == LEAST_LOGPROB
    assert entry.top[2] == (1, LEAST_LOGPROB)


def test_prompt_logprobs_match_log_softmax_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(23, 31)
    targets = torch.arange(23)
    whole = prompt_logprobs(logits, targets, 4)
    monkeypatch.setattr("memory_efficient_gpt.sampling.logprobs._MAX_ELEMENTS", 31 * 5)
    pieces = prompt_logprobs(logits, targets, 4)
    assert whole.entries() == pieces.entries()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(whole.logprobs, expected)
    assert whole.entries([1] * 23)[0].top == whole.entries()[0].top[:1]


def test_prompt_logprobs_of_nothing_are_empty() -> None:
    assert prompt_logprobs(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 2).entries() == []


def test_a_rows_logprobs_are_the_same_bits_alone_and_among_others() -> None:
    """Ties, too: of equal alternatives the lower ids are given, however many are asked for."""
    logits = (logits_of(40, 3001) * 2).round() / 2
    ids = torch.arange(40)
    together = gather_logprobs(logits, ids, 7)
    for row in range(40):
        own = gather_logprobs(logits[row : row + 1], ids[row : row + 1], 3)
        assert torch.equal(own.logprobs, together.logprobs[row : row + 1])
        assert torch.equal(own.top_ids, together.top_ids[row : row + 1, :3])
        assert torch.equal(own.top_logprobs, together.top_logprobs[row : row + 1, :3])
        kept = sorted(range(3001), key=lambda token: (-float(logits[row, token]), token))[:7]
        assert together.top_ids[row].tolist() == kept
