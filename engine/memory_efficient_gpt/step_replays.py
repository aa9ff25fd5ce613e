"""Steps that are done again instead of computed call by call: CUDA graphs, or recordings on the CPU.

Purpose: which of them an engine gets, and what its notes say.
Does not know: how either works.
Invariant: whatever is chosen or not has a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from memory_efficient_gpt.attention.context import AttentionBackend
from memory_efficient_gpt.attention.cpu import NativeCPUBackend
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.padded_steps import PaddedSteps
from memory_efficient_gpt.step_graphs import StepGraphs
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_recordings import MOST_ROWS, StepRecordings
from memory_efficient_gpt.step_shape import Choice, RowsToSample


class StepReplays(Protocol):
    """What does steps again.

    chooses: whether they choose tokens, too. obstacle: why there are none, or None.
    """

    @property
    def chooses(self) -> bool: ...
    @property
    def obstacle(self) -> str | None: ...

    def run(self, layout: StepLayout, samples: RowsToSample, choice: Choice | None) -> torch.Tensor | None:
        """Launch a step; returns `PaddedSteps.result`, or None if the step is not one for this."""

    def check(self, vocabulary: int, no_slot: int) -> str | None:
        """Try it on one token; the obstacle."""

    def forget(self) -> None:
        """Drop what was kept."""


@dataclass(frozen=True, slots=True)
class Replays:
    """make: from steps in fixed places. decode_rows: the most rows, where only decoding steps are replayed;
    None: others are, too."""

    make: Callable[[PaddedSteps], StepReplays]
    decode_rows: int | None = None


def choose_replays(config: EngineConfig, backend: AttentionBackend) -> Replays | None:
    """By the attention's kernels and the settings; None: steps are computed call by call."""
    if backend.name == "triton" and config.cuda_graphs:
        return Replays(StepGraphs)
    if isinstance(backend, NativeCPUBackend) and config.record_steps:
        kernels = backend.kernels
        return Replays(lambda steps: StepRecordings(steps, kernels), MOST_ROWS)
    return None


def replay_note(device: torch.device, backend: AttentionBackend, obstacle: str | None) -> str:
    """What to tell of them. obstacle: why there are none, or None."""
    if device.type == "cuda":
        if obstacle is not None and backend.name != "triton":
            obstacle = "attention is not by Triton"
        return "CUDA graphs" if obstacle is None else f"no CUDA graphs: {obstacle}"
    if obstacle is not None:
        return f"decoding steps are not recorded: {obstacle}"
    return f"decoding steps of up to {MOST_ROWS} sequences are recorded"
