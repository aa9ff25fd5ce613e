"""From a step's logits to its outcome: which rows are sampled, and the way back to the host.

Purpose: draw the tokens a plan asks for, with log probabilities where wanted.
Does not know: models, KV caches, the mathematics of sampling.
Invariant: nothing waits for the device before `PendingStep.wait`, which is called once.

Rows of a step's logits: one for each sample, then one for each prompt token whose logprob is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from memory_efficient_gpt.padded_steps import sampled_rows
from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import (
    LogprobTensors,
    Sampled,
    SampleRow,
    SamplingBatch,
    prompt_logprobs,
    sample,
)
from memory_efficient_gpt.sampling.batch import HostParameters
from memory_efficient_gpt.sampling.logprobs import copy_to_host
from memory_efficient_gpt.sampling.rng import numbers_of, streams
from memory_efficient_gpt.sequence import Chunk, Sample, Sequence, Step, StepOutcome
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import Choice, RowsToSample
from memory_efficient_gpt.uploads import upload


@dataclass(slots=True)
class PendingStep:
    """A launched step whose results may still be on their way to the host.

    token_ids `[R] int64` stay on the device, one for each of the step's samples; None if it has none.
    """

    token_ids: torch.Tensor | None = None
    sampled: Sampled | None = None
    prompt_logprobs: dict[int, tuple[LogprobTensors, int]] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None

    def wait(self) -> StepOutcome:
        """The step's tokens: the only place where the host waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        outcome = StepOutcome([], [], [])
        if self.sampled is not None:
            outcome = StepOutcome(
                self.sampled.token_ids.tolist(), self.sampled.ok.tolist(), self.sampled.token_logprobs()
            )
        for chunk, (tensors, count) in self.prompt_logprobs.items():
            outcome.prompt_logprobs[chunk] = tensors.entries([count] * len(tensors.ids))
        return outcome


def draw(
    step: Step,
    logits: torch.Tensor,
    end_ids: tuple[int, ...],
    last_tokens: torch.Tensor | None = None,
    *,
    kernel: bool = False,
) -> PendingStep:
    """Sample from logits `[R, V]` (see the module's docstring for the rows) without waiting.

    end_ids: the model's end-of-sequence tokens. last_tokens `[slots] int64`: each slot's newest token,
    where tokens may not have been read by the host yet. kernel: see SamplingBatch.
    """
    pending = PendingStep()
    count = len(step.samples)
    if count:
        rows = [_sample_row(s, end_ids) for s in step.samples]
        unread = _unread_tokens(step.samples, rows, last_tokens)
        batch = SamplingBatch(rows, logits.device, unread, kernel=kernel)
        sampled = sample(logits[:count], batch)
        pending.token_ids = sampled.token_ids
        pending.sampled = sampled.to_host()
    offset = count
    for number, chunk in enumerate(step.chunks):
        if chunk.prompt_logprobs is None:
            continue
        targets = chunk.seq.tokens[chunk.start + 1 : chunk.start + 1 + num_prompt_targets(chunk)]
        ids = upload(np.asarray(targets, dtype=np.int64), logits.device)
        tensors = prompt_logprobs(logits[offset : offset + len(targets)], ids, chunk.prompt_logprobs)
        pending.prompt_logprobs[number] = (tensors.to_host(), chunk.prompt_logprobs)
        offset += len(targets)
    if logits.device.type == "cuda":
        pending.arrived = torch.cuda.Event()
        pending.arrived.record()
    return pending


def drawn(buffer: torch.Tensor, rows: int) -> PendingStep:
    """A step whose `rows` tokens a graph has chosen; `buffer` as PaddedSteps.result returns it."""
    pending = PendingStep(sampled=sampled_rows(copy_to_host(buffer), rows))
    if buffer.device.type == "cuda":
        pending.arrived = torch.cuda.Event()
        pending.arrived.record()
    return pending


class Chooser:
    """Tells a graph how to choose a step's tokens; keeps what steps that repeat each other share."""

    def __init__(self) -> None:
        self._kept: _Choosing | None = None

    def choose(self, step: Step, layout: StepLayout) -> tuple[Choice | None, RowsToSample]:
        """What a graph needs to know of a step's samples, and whether it can choose their tokens itself.

        It can't (None) if any row wants logprobs or changed logits.
        """
        planned = step.first or step
        if step.first is None or self._kept is None or self._kept.step is not planned:
            self._kept = _Choosing(planned, layout.query_starts)
        return self._kept.at(step.ahead)

    def rest(self) -> None:
        """No sequence is running: keep none of the last ones."""
        self._kept = None


class _Choosing:
    """How tokens of one step, and of those that repeat it, are chosen."""

    def __init__(self, step: Step, query_starts: npt.NDArray[np.int32]) -> None:
        self.step = step
        samples = step.samples
        self._rows = query_starts[[s.chunk + 1 for s in samples]] - 1 if samples else _NO_ROWS
        self._slots = np.array([s.seq.slot for s in samples], dtype=np.int32)
        params = [sample.seq.request.params for sample in samples]
        self._parameters = HostParameters(params)
        self._counters = np.array([s.output_index for s in samples], dtype=np.uint64)
        self._streams = streams([s.seq.seed for s in samples])
        self._plain = all(map(_plain, params))
        held = [p.min_tokens - s.output_index for p, s in zip(params, samples, strict=True)]
        self._least = max(held, default=0)

    def at(self, ahead: int) -> tuple[Choice | None, RowsToSample]:
        if not self._plain or ahead < self._least:
            return None, RowsToSample(self._rows, self._slots)
        if not self._parameters.draws:
            return Choice.GREEDY, RowsToSample(self._rows, self._slots)
        numbers = numbers_of(self._streams, self._counters + np.uint64(ahead))
        return Choice.DRAW, RowsToSample(self._rows, self._slots, self._parameters, numbers)


_NO_ROWS: Final = np.zeros(0, dtype=np.int32)


def _plain(params: SamplingParams) -> bool:
    """Whether tokens are chosen from the model's own logits, and nothing else is wanted of these."""
    return not (params.penalized or params.logit_bias or params.logprobs is not None)


def num_prompt_targets(chunk: Chunk) -> int:
    """How many of a chunk's rows predict a token of the prompt."""
    return max(0, min(chunk.start + chunk.num_tokens, chunk.seq.prompt_len - 1) - chunk.start)


def _sample_row(sample: Sample, end_ids: tuple[int, ...]) -> SampleRow:
    seq, params = sample.seq, sample.seq.request.params
    suppress: tuple[int, ...] = ()
    if sample.output_index < params.min_tokens:
        suppress = (*end_ids, *params.stop_token_ids)
    return SampleRow(
        params=params,
        seed=seq.seed,
        counter=sample.output_index,
        history=_distinct_prompt(seq) if params.penalized else (),
        outputs=seq.tokens[seq.prompt_len :] if params.penalized else (),
        suppress=suppress,
    )


def _distinct_prompt(seq: Sequence) -> tuple[int, ...]:
    """The prompt's tokens once each: a repetition penalty counts none twice, and prompts are long."""
    if seq.distinct_prompt is None:
        seq.distinct_prompt = tuple(set(seq.request.prompt_token_ids))
    return seq.distinct_prompt


def _unread_tokens(
    samples: list[Sample], rows: list[SampleRow], last_tokens: torch.Tensor | None
) -> torch.Tensor | None:
    """Each row's token that is sampled but not read yet, -1 for none; None if no row needs it."""
    unread = [
        r.params.penalized and len(r.outputs) < s.output_index for s, r in zip(samples, rows, strict=True)
    ]
    if last_tokens is None or not any(unread):
        return None
    slots = upload(np.asarray([s.seq.slot for s in samples], dtype=np.int64), last_tokens.device)
    missing = upload(np.asarray(unread), last_tokens.device)
    return torch.where(missing, last_tokens[slots], -1)
