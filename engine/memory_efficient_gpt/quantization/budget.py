"""Which scheme each group of layers gets, so that a model fits into so many bits per weight.

Purpose: the plan with the least predicted divergence whose stored bits stay within a budget.
Does not know: models, how divergences were found, how weights are quantized.
Invariant: a plan never takes more than its budget, and with a larger one its predicted divergence is never
higher.

Chosen by dynamic programming over groups and bits (a multiple-choice knapsack), bits counted in the greatest
common divisor of what schemes differ by. That is exact. Where it would take more than `MOST_UNITS` units,
bits are counted in larger units, rounded up for each group: still within the budget, and short of the best
by what one unit for each group can buy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

import numpy as np

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.scheme import Scheme, parse_scheme
from memory_efficient_gpt.quantization.sensitivity import Candidate, Sensitivity

DEFAULT_OPTIONS: Final = tuple(map(parse_scheme, ("int4-g128", "int4", "int8")))
MOST_UNITS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """A candidate for each group, and what all of them together take and cost."""

    groups: tuple[Sensitivity, ...]
    chosen: tuple[Candidate, ...]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The plan that `quantize_model` takes: a scheme by the name of each layer."""
        pairs = zip(self.groups, self.chosen, strict=True)
        return {layer.name: pick.scheme for measured, pick in pairs for layer in measured.group.layers}

    @property
    def num_bytes(self) -> int:
        """Of all groups' codes, scales and offsets."""
        return sum(-(-candidate.bits // 8) for candidate in self.chosen)

    @property
    def bits_per_weight(self) -> float:
        """Average over all groups."""
        return sum(c.bits for c in self.chosen) / sum(s.group.num_weights for s in self.groups)

    @property
    def divergence(self) -> float:
        """Predicted: nats per token by which predictions differ from the float model's."""
        return sum(candidate.divergence for candidate in self.chosen)


def choose_schemes(measured: Sequence[Sensitivity], bits_per_weight: float) -> MixedPlan:
    """The best plan within `bits_per_weight` on average. Raises ConfigError if no plan is that small."""
    sizes = [[candidate.bits for candidate in group.candidates] for group in measured]
    costs = [[candidate.divergence for candidate in group.candidates] for group in measured]
    num_weights = sum(group.group.num_weights for group in measured)
    picks = least_cost(sizes, costs, round(bits_per_weight * num_weights))
    if picks is None:
        least = sum(map(min, sizes)) / num_weights
        raise ConfigError(
            [f"{bits_per_weight:g} bits per weight are too few: these schemes take at least {least:.2f}."]
        )
    chosen = (group.candidates[pick] for group, pick in zip(measured, picks, strict=True))
    return MixedPlan(tuple(measured), tuple(chosen))


def least_cost(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """One index for each group: the least sum of costs with sizes of at most `budget`; None if there is none.

    Exact where sizes differ by at most `MOST_UNITS` times their differences' greatest common divisor.
    """
    smallest = [min(group) for group in sizes]
    room = budget - sum(smallest)
    if room < 0:
        return None
    extra = [[size - least for size in group] for group, least in zip(sizes, smallest, strict=True)]
    unit = _unit(extra)
    steps = [[-(-size // unit) for size in group] for group in extra]
    capacity = min(room // unit, sum(map(max, steps)))
    best = np.zeros(capacity + 1)  # least cost of the groups so far within 0, 1, ... units
    picks: list[np.ndarray] = []
    for group_steps, group_costs in zip(steps, costs, strict=True):
        trials = np.full((len(group_steps), capacity + 1), np.inf)
        for trial, step, cost in zip(trials, group_steps, group_costs, strict=True):
            if step <= capacity:
                trial[step:] = best[: capacity + 1 - step] + cost
        picks.append(trials.argmin(axis=0))
        best = trials.min(axis=0)
    chosen: list[int] = []
    for group_steps, pick in zip(reversed(steps), reversed(picks), strict=True):
        chosen.append(int(pick[capacity]))
        capacity -= group_steps[chosen[-1]]
    return chosen[::-1]


def _unit(extra: Sequence[Sequence[int]]) -> int:
    """Bits counted as one, whatever the budget: so a larger one allows all that a smaller one does."""
    divisor = reduce(math.gcd, (size for group in extra for size in group), 0) or 1
    return max(divisor, -(-sum(map(max, extra)) // MOST_UNITS))
