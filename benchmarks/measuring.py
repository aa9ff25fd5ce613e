"""Measurements that take turns, and the figures made of them.

Purpose: `interleaved` runs, `Figure`s with targets, and what a workload gets and gives.
Does not know: engines, files, the terminal.
Invariant: a ratio compares runs that took turns, with the same prompts; every raw number is kept.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should reach."""

    bound: float
    sense: Literal["at least", "at most"] = "at least"

    def met(self, value: float) -> bool:
        """Whether `value` is good enough."""
        return value >= self.bound if self.sense == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.sense == 'at least' else '≤'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report. unit: "x" for a ratio."""

    name: str
    value: float
    unit: str = "x"
    target: Target | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """pass, miss, or nothing without a target."""
        if self.target is None:
            return ""
        return "pass" if self.target.met(self.value) else "miss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What every workload is given. cache: a folder for models, outside the repository."""

    cache: Path
    threads: int
    repetitions: int
    advance: Advance


@dataclass(slots=True)
class Outcome:
    """What a workload gives. facts: of each engine. runs: every measurement of each arm, in order."""

    figures: list[Figure]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """A named measurement."""

    name: str
    title: str
    run: Callable[[Conditions], Outcome]


def interleaved(
    arms: Mapping[str, Callable[[int], T]], repetitions: int, advance: Advance
) -> dict[str, list[T]]:
    """Run every arm once in each repetition, in alternating order; results by arm.

    An arm is called with the repetition's number, from which it makes its prompts. Repetition -1 comes
    first and is dropped: caches, pages and thread pools warm up.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    for repetition in range(-1, repetitions):
        order = list(arms) if repetition % 2 == 0 else list(reversed(list(arms)))
        for name in order:
            advance(name)
            result = arms[name](repetition)
            if repetition >= 0:
                results[name].append(result)
    return results


def ratio_of_best(
    numerators: Sequence[float], denominators: Sequence[float], *, best: Callable[[Sequence[float]], float]
) -> float:
    """The best of one arm by the best of the other. best: max for rates, min for times.

    Other work on the machine only ever slows a run down, and not both arms alike (threads that spin while
    they wait suffer most), so the best of several is the nearest to what the engines do undisturbed.
    """
    return best(numerators) / best(denominators)


def spread(values: Sequence[float]) -> str:
    """Median and range, for a note."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def random_prompts(repetition: int, count: int, length: int, vocab: int) -> list[list[int]]:
    """Token ids that no other repetition has, so that no prefix cache helps."""
    source = random.Random(f"{repetition}:{count}:{length}")
    return [[source.randrange(10, vocab) for _ in range(length)] for _ in range(count)]
