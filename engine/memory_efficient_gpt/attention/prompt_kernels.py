"""Kernels of other libraries for the rows of a step that have several tokens.

Purpose: what such a kernel is to a backend, and which rows a step has for it.
Does not know: the libraries, the backend's own kernels.
Invariant: no host synchronization. What a step's rows are is known on the host, or the step is not for these
kernels: so captured steps never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs of a step's tokens start .. end - 1: `[end - start, Hq, Dv]`, query's dtype."""

    start: int
    end: int
    output: torch.Tensor


class PromptKernel(Protocol):
    """Computes all of a step's rows with several tokens, or none."""

    @property
    def name(self) -> str:
        """What people call it."""

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> list[Piece] | None:
        """Their outputs for query `[T, Hq, Dk]`, the cache being written; None: the step is not for it."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows first .. end - 1 of a step: from the first that has several tokens to the last one.

    start: their first token; tokens: of all of them; prompts: rows with several (row, first token, tokens).
    longest, longest_context: of a row, in tokens; shortest: of a prompt. whole: all with several are computed
    from their beginning.
    """

    first: int
    end: int
    start: int
    tokens: int
    prompts: tuple[tuple[int, int, int], ...]
    longest: int
    shortest: int
    longest_context: int
    whole: bool


def prompt_rows(context: StepContext) -> PromptRows | None:
    """Those rows, if there are any and the host knows their lengths; found once for all layers."""
    if "prompt rows" not in context.derived:
        context.derived["prompt rows"] = _find(context.host_query_lens, context.host_context_lens)
    found: PromptRows | None = context.derived["prompt rows"]
    return found


def _find(lens: Sequence[int] | None, contexts: Sequence[int] | None) -> PromptRows | None:
    if lens is None or contexts is None:
        return None
    starts = list(accumulate(lens, initial=0))
    prompts = tuple((row, starts[row], length) for row, length in enumerate(lens) if length > 1)
    if not prompts:
        return None
    first, end = prompts[0][0], prompts[-1][0] + 1
    return PromptRows(
        first=first,
        end=end,
        start=starts[first],
        tokens=starts[end] - starts[first],
        prompts=prompts,
        longest=max(lens[first:end]),
        shortest=min(length for _, _, length in prompts),
        longest_context=max(contexts[first:end]),
        whole=all(contexts[row] == length for row, _, length in prompts),
    )
