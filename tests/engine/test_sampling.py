"""Sampling against a plain-Python float64 reference, and its promises about batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, prompt_logprobs, sample
from memory_efficient_gpt.sampling.logprobs import LEAST_LOGPROB
from memory_efficient_gpt.sampling.rng import _mix, uniforms

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


# ---------------------------------------------------------------- the reference


def reference_logits(logits: Sequence[float], row: SampleRow, pending: int = -1) -> list[float]:
    """Bias, suppression and penalties, token by token."""
    params = row.params
    outputs = [*row.outputs] + ([pending] if pending >= 0 else [])
    adjusted = []
    for token, value in enumerate(logits):
        value += params.logit_bias.get(token, 0.0)
        if token in row.suppress:
            value = -math.inf
        if token in outputs or token in row.history:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        count = outputs.count(token)
        value -= count * params.frequency_penalty + (params.presence_penalty if count else 0.0)
        adjusted.append(value)
    return adjusted


def reference_weights(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Unnormalised probabilities by token id after temperature, min_p, top_k and top_p."""
    top = max(logits)
    weights = [math.exp((value - top) / params.temperature) for value in logits]
    weights = [w if w >= params.min_p else 0.0 for w in weights]
    if params.top_k is not None:
        bound = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= bound else 0.0 for w in weights]
    if params.top_p < 1.0:
        total, before, bound = sum(weights), 0.0, 1.0
        for weight in sorted(weights, reverse=True):
            if before >= params.top_p * total:
                break
            before, bound = before + weight, weight
        weights = [w if w >= bound else 0.0 for w in weights]
    return weights


def near_a_decision(logits: Sequence[float], params: SamplingParams, margin: float = 1e-5) -> bool:
    """Whether rounding could rightly change which tokens the filters keep."""
    plain = reference_weights(logits, replace(params, top_p=1.0, min_p=0.0))
    if any(abs(w - params.min_p) < margin for w in plain if params.min_p):
        return True
    kept = sorted(reference_weights(logits, replace(params, top_p=1.0)), reverse=True)
    before, total = 0.0, sum(kept)
    for weight in kept:
        before += weight
        if abs(before - params.top_p * total) < margin * total and params.top_p < 1.0:
            return True
    return False


def grid_draws(logits: torch.Tensor, row: SampleRow, points: int) -> list[tuple[float, int]]:
    """(u, token) for u on a grid: the row's whole inverse CDF, through the real code."""
    batch = SamplingBatch([row] * points, CPU)
    assert batch.draw is not None
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    batch.draw = replace(batch.draw, uniform=grid[:, None])
    sampled = sample(logits.expand(points, -1), batch)
    assert sampled.ok.all()
    return list(zip(grid.tolist(), sampled.token_ids.tolist(), strict=True))


def chosen(logits: torch.Tensor, rows: Sequence[SampleRow], **kwargs: Any) -> list[int]:
    return sample(logits, SamplingBatch(rows, CPU, **kwargs)).token_ids.tolist()


def logits_of(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def distinct_logits(size: int, seed: int) -> torch.Tensor:
    """Well separated values in random order, so that rounding cannot reorder them."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order * 0.11 - 2.0


filters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 2.0),
        "min_p": st.floats(0.0, 0.9),
        "top_k": st.integers(2, 70),
        "top_p": st.floats(0.05, 0.999),
    },
)
penalties = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 39), st.floats(-20.0, 20.0), max_size=5),
    },
)


# ---------------------------------------------------------------- random numbers


def test_uniforms_depend_on_seed_and_counter_only() -> None:
    together = uniforms([5, -3, 2**63 - 1], [0, 7, 2**31])
    alone = [uniforms([s], [c])[0] for s, c in ((5, 0), (-3, 7), (2**63 - 1, 2**31))]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_uniforms_keep_their_values_across_versions() -> None:
    """A seed must give the same text after an upgrade."""
    assert uniforms([0, 1, -1], [0, 0, 5]).tolist() == [
        0.6524484863740322,
        0.36818951565166946,
        0.15403342580516755,
    ]


def test_mixing_is_that_of_splitmix64() -> None:
    """The generator's published first two outputs for the seed 0."""
    golden = 0x9E3779B97F4A7C15
    state = np.array([golden, 2 * golden % 2**64], dtype=np.uint64)
    assert _mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("axis", ["counter", "seed", "both"])
def test_uniforms_are_uniform_and_uncorrelated(axis: str) -> None:
    numbers = list(range(20_000))
    constant = [3] * len(numbers)
    seeds, counters = {
        "counter": (constant, numbers),
        "seed": (numbers, constant),
        "both": (numbers, numbers),
    }[axis]
    drawn = uniforms(seeds, counters)
    pairs = (drawn[:-1] * 8).astype(int) * 8 + (drawn[1:] * 8).astype(int)
    observed = [int((pairs == cell).sum()) for cell in range(64)]
    assert chi_square(observed, [len(pairs) / 64] * 64) < chi_square_limit(63)


def chi_square(observed: Sequence[int], expected: Sequence[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def chi_square_limit(freedom: int) -> float:
    """Exceeded with probability 1e-4 (Wilson-Hilferty; z = 3.719)."""
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3)


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_most_likely_token(dtype: torch.dtype) -> None:
    logits = logits_of(5, 301).to(dtype)
    params = SamplingParams(temperature=0.009)
    assert chosen(logits, [SampleRow(params, 0, 0)] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=0.0, temperature=2.0)])
def test_filters_that_leave_one_token_are_greedy_even_with_ties(params: SamplingParams) -> None:
    logits = torch.zeros(64, 10)
    assert set(chosen(logits, [SampleRow(params, 1, i) for i in range(64)])) == {0}


# ---------------------------------------------------------------- filters and the draw


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


# ---------------------------------------------------------------- bias, suppression, penalties


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
    from memory_efficient_gpt.sampling.adjust import adjust

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
    from memory_efficient_gpt.sampling.adjust import adjust

    logits = logits_of(1, 40, seed=seed)
    params = SamplingParams(**options)
    known = SamplingBatch([SampleRow(params, 0, 0, (1, 2, 3), outputs)], CPU)
    unread = SamplingBatch(
        [SampleRow(params, 0, 0, (1, 2, 3), outputs[:-1])], CPU, torch.tensor([outputs[-1]])
    )
    assert torch.equal(adjust(logits, known), adjust(logits, unread))


@pytest.mark.parametrize("outputs", [[], [0, 0, 5]])
def test_no_pending_token_changes_nothing(outputs: list[int]) -> None:
    from memory_efficient_gpt.sampling.adjust import adjust

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


# ---------------------------------------------------------------- rows do not affect each other


def params_of(options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**options)


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


# ---------------------------------------------------------------- logprobs


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


# ---------------------------------------------------------------- devices


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
