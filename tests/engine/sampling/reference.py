"""Sampling in plain Python and float64, token by token, and what the tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, sample

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


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


def chi_square(observed: Sequence[int], expected: Sequence[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def chi_square_limit(freedom: int) -> float:
    """Exceeded with probability 1e-4 (Wilson-Hilferty; z = 3.719)."""
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3)


def params_of(options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**options)
