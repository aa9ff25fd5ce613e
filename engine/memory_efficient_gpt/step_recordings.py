"""Decoding steps on the CPU, recorded once for a number of sequences and replayed by the native library.

Purpose: a step of few sequences without Python's way through the model, which costs more than a small model's
arithmetic.
Does not know: requests, plans, architectures.
Invariant: a step's logits are those of the model's code: a recording is used after one of its replays gave
the code's bits on other inputs. What can't be recorded is computed call by call, and the log says why.

A kind of step is computed call by call the first time, recorded the second, compared the third.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.native.recording import Recording, recording
from memory_efficient_gpt.padded_steps import PaddedSteps, StepKind
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import Choice, RowsToSample, StepShape

logger = logging.getLogger(__name__)

MOST_ROWS: Final = 16
"""Beyond them the arithmetic hides Python's way."""
_LEAST_CONTEXT: Final = 4096


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a recording is for. threads: those that its calls use."""

    step: StepKind
    threads: int


@dataclass(slots=True)
class _Entry:
    recording: Recording | None = None
    trusted: bool = False


class StepRecordings:
    """The recordings of one model on the CPU.

    obstacle: why nothing is recorded, or None. recorded, replayed: kinds of steps so far, and steps by them.
    """

    chooses = False

    def __init__(self, steps: PaddedSteps, kernels: Kernels) -> None:
        self.obstacle: str | None = None
        self.recorded = self.replayed = 0
        self._steps = steps
        self._kernels = kernels
        self._entries: dict[_Kind, _Entry] = {}

    def run(self, layout: StepLayout, samples: RowsToSample, choice: Choice | None) -> torch.Tensor | None:
        """Compute a step; returns its logits `[R, V]`, to be read before the next one is computed, or None if
        the step is not one for a recording (now). Tokens are chosen elsewhere: choice must be None."""
        assert choice is None, "recordings choose no tokens"
        rows = layout.num_rows
        if self.obstacle is not None or rows > MOST_ROWS or layout.num_tokens != rows:
            return None
        longest = max(_LEAST_CONTEXT, int(layout.context_lens.max()))
        shape = StepShape(rows, rows, 1 << (longest - 1).bit_length(), decode=True)
        kind = _Kind(StepKind(shape, None), self._kernels.thread_limit())
        self._steps.load(layout, samples, shape)
        entry = self._entries.get(kind)
        if entry is None:
            self._steps.compute(kind.step)
            self._entries[kind] = _Entry()
        elif not self._compute(kind.step, entry):
            return None
        return self._steps.result(kind.step, len(samples.logit_rows))

    def check(self, vocabulary: int, no_slot: int) -> str | None:
        """Record and compare a step of one token; why nothing is recorded, or None.

        no_slot: an element of last_tokens that belongs to no slot. Writes to the trash block only.
        """
        for number in range(3):
            one = np.zeros(1, dtype=np.int32)
            layout = StepLayout(
                np.full(1, (vocabulary - 1) // (number + 1)), one - 1, np.full(1, number), np.full(1, number),
                np.array([0, 1], np.int32), one + number + 1, np.zeros((1, 1), np.int32),
            )  # fmt: skip
            self.run(layout, RowsToSample(one, one + no_slot), None)
        return self.obstacle

    def forget(self) -> None:
        """Drop all recordings and the memory that they work in."""
        self._entries.clear()
        self._steps.drop_logits()

    def _compute(self, kind: StepKind, entry: _Entry) -> bool:
        """Leave the step's logits in their place; False if nothing is recorded after all."""
        if entry.recording is None:
            return self._record(kind, entry)
        entry.recording.replay()
        if not entry.trusted:
            replayed = self._logits(kind)
            self._steps.compute(kind)
            if not torch.equal(replayed, self._logits(kind)):
                self._give_up("a replay gave other logits than the model's code")
                return False
            entry.trusted = True
        self.replayed += 1
        return True

    def _record(self, kind: StepKind, entry: _Entry) -> bool:
        try:
            with recording(self._kernels.compiled) as recorder:
                self._steps.compute(kind)
        except Exception as error:  # noqa: BLE001  # a model's code may not bear being watched
            self._give_up(f"{error}".splitlines()[0][:200] if str(error) else type(error).__name__)
            return False
        entry.recording = recorder.finish()
        self.recorded += 1
        return True

    def _logits(self, kind: StepKind) -> torch.Tensor:
        """A copy; NaN equals nothing, so it becomes a number."""
        return self._steps.result(kind, kind.shape.rows).nan_to_num()

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        self._entries.clear()
        logger.info("Steps are not recorded: %s.", reason)
