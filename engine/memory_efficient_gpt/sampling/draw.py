"""Drawing one token a row from logits: temperature, min_p, top_k, top_p, inverse CDF.

Purpose: the filters and the draw, for rows that are not greedy.
Does not know: penalties, which rows are greedy, logprobs.
Invariant: a row's token depends on that row alone; no other row and no summation order can change it.

Weights. A token's weight is w = exp((logit - max) / temperature), in [0, 1] and 1 for the most likely one.
    min_p   keeps w >= min_p
    top_k   keeps w >= the k-th largest weight of what is left
    top_p   keeps the smallest set of most likely tokens whose share of what is left is at least top_p
Each filter is a lower bound on weights, so that they act as one threshold, tokens of equal weight stay or
go together, and only sorted values are needed, never a permutation.

Exactness. For every sum the weights are rounded down to multiples of 2**-40 and added as integers (a sum
stays below 2**62 for up to 4 million tokens). Integers add to the same sum in any order: scans of
different shapes, devices and thread counts agree, and prefix sums of sorted candidates equal those of the
full row. A token of weight below 2**-40 of the best one's is never drawn. The draw takes the first token, by
id, whose cumulative weight exceeds uniform * total.
"""

from __future__ import annotations

from typing import Final

import torch

from memory_efficient_gpt.sampling.batch import Draw, Truncation
from memory_efficient_gpt.sampling.ordering import keep_at_least, largest, sort_descending

_UNIT: Final = 2.0**40


def draw_tokens(logits: torch.Tensor, top: torch.Tensor, draw: Draw) -> torch.Tensor:
    """One token a row: logits `[S, V] float32` and their maxima `[S, 1]` -> `[S, 1] int64`.

    Rows whose maximum is not finite give a meaningless number from 0 to V.
    """
    weights = (logits - top).div_(draw.temperature).exp_()
    threshold = _threshold(weights, draw)
    if threshold is not None:
        weights = keep_at_least(weights, threshold)
    cumulative = _integers(weights).cumsum_(-1)
    total = cumulative[:, -1:]
    target = (draw.uniform * total).long()  # below the total: uniform is at most 1 - 2**-53
    return torch.searchsorted(cumulative, target, right=True)


def _integers(weights: torch.Tensor) -> torch.Tensor:
    return (weights * _UNIT).long()


def _threshold(weights: torch.Tensor, draw: Draw) -> torch.Tensor | None:
    """The least weight that each row keeps, `[S, 1] float32`, or None when no row has a filter."""
    if draw.min_p is None and not draw.truncations:
        return None
    threshold = draw.min_p if draw.min_p is not None else torch.zeros_like(weights[:, :1])
    for group in draw.truncations:
        if group.rows is None:
            threshold = _truncate(weights, threshold, group)
        else:
            cut = _truncate(weights.index_select(0, group.rows), threshold[group.rows], group)
            threshold = threshold.index_copy(0, group.rows, cut)
    return threshold


def _truncate(weights: torch.Tensor, threshold: torch.Tensor, group: Truncation) -> torch.Tensor:
    """Raise the rows' thresholds `[G, 1]` to what top_k and top_p demand of weights `[G, V]`."""
    if group.top_k is None:
        candidates = sort_descending(weights)
    else:
        size = weights.shape[-1]
        candidates = largest(weights, min(group.max_top_k, size))
        threshold = threshold.maximum(candidates.gather(1, group.top_k.clamp(max=size) - 1))
    if group.top_p is None:
        return threshold
    return threshold.maximum(_nucleus_bound(weights, candidates, threshold, group))


def _nucleus_bound(
    weights: torch.Tensor, candidates: torch.Tensor, threshold: torch.Tensor, group: Truncation
) -> torch.Tensor:
    """The least weight in each row's nucleus, `[G, 1]`: the first in descending order up to which the sum
    reaches top_p * total.

    `candidates [G, C]` are the largest weights in descending order: with top_k those that reach the
    threshold, except for ties at the threshold itself, else all. A nucleus that takes more than the
    candidates ends in those ties; its bound is then not above the threshold and changes nothing.
    """
    assert group.top_p is not None
    cumulative = _integers(keep_at_least(candidates, threshold)).cumsum_(-1)
    if group.top_k is None:
        total = cumulative[:, -1:]
    else:
        total = _integers(keep_at_least(weights, threshold)).sum(-1, keepdim=True)
    enough = (group.top_p * total).ceil().long()
    last = torch.searchsorted(cumulative, enough)
    return candidates.gather(1, last.clamp_(max=candidates.shape[-1] - 1))
