"""Which kinds of calls may wait for the next one in a model's steps, found out on the model itself.

Purpose: run a model with calls that wait, compare, and say what is gained or why not.
Does not know: architectures' names, kernels, how the model is run (the caller's `run`).
Invariant: the model is not changed; a kind with which its logits differ, or that never finds a kernel to
join, is not among those given.

While it is tried, a result that waits is NaN: whatever reads it by a way that torch does not tell shows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from memory_efficient_gpt.fusion.apply import TOLERANCES, relative_difference
from memory_efficient_gpt.native.deferral import Deferral, DeferredKind

logger = logging.getLogger(__name__)

Run = Callable[[], torch.Tensor]
"""A forward pass of the model over a few tokens, writing to a cache as steps do; gives logits. The same at
every call."""

_NAMES: Final[dict[DeferredKind, str]] = {
    "sums": "residual sums computed by norms",
    "turns": "rotary turns by the cache's write",
    "head_norms": "norms of queries and keys by these turns",
}


@dataclass(slots=True)
class DeferralReport:
    """What `try_deferral` found. joined: calls of a pass that another kernel computes; dropped: why not."""

    joined: Counter[DeferredKind] = field(default_factory=Counter)
    dropped: dict[DeferredKind, str] = field(default_factory=dict)

    @property
    def kinds(self) -> frozenset[DeferredKind]:
        """Those that may wait, with a gain."""
        return frozenset(self.joined)

    def summary(self) -> str:
        """One line for a log or for GET /v1/models; empty if there was nothing to gain."""
        done = [f"{count} {_NAMES[kind]}" for kind, count in self.joined.items()]
        kept = [f"no {_NAMES[kind]}: {why}" for kind, why in self.dropped.items()]
        return "; ".join((*done, *kept))


def try_deferral(run: Run, kinds: Sequence[DeferredKind]) -> DeferralReport:
    """Try all kinds in one pass, or one more at a time if that is not right. run: see `Run`.

    kinds: those that only join calls of another kind come after it.
    """
    report = DeferralReport()
    with torch.inference_mode():
        want = run()
        joined = _tried(run, kinds, want)
        if isinstance(joined, str):
            joined = Counter()
            accepted: tuple[DeferredKind, ...] = ()
            for kind in kinds:
                outcome = _tried(run, (*accepted, kind), want)
                if isinstance(outcome, str):
                    report.dropped[kind] = outcome
                else:
                    joined, accepted = outcome, (*accepted, kind)
    report.joined = joined
    if report.summary():
        logger.info(report.summary())
    return report


def _tried(run: Run, kinds: Sequence[DeferredKind], want: torch.Tensor) -> Counter[DeferredKind] | str:
    """What these kinds of calls joined when they waited together, or why they may not."""
    deferral = Deferral(frozenset(kinds), poison=True)
    reason = _difference(run, deferral, want)
    return deferral.taken if reason is None else reason


def _difference(run: Run, deferral: Deferral, want: torch.Tensor) -> str | None:
    """Why calls may not wait; None if the logits are what they were."""
    try:
        with deferral:
            got = run()
    except Exception as error:  # noqa: BLE001  # any model code may run here, and Triton's compiler
        return (
            f"the model could not be run with it ({type(error).__name__}: {error}".splitlines()[0][:200] + ")"
        )
    difference = relative_difference(got, want)  # none, but for models whose sums are not repeatable
    if difference <= TOLERANCES.get(want.dtype, 0.0):
        return None
    return f"the model's logits differ by {difference:.2g}"
