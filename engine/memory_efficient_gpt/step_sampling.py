"""From a step's logits to its outcome: which rows are sampled, and the way back to the host.

Purpose: draw the tokens a plan asks for, with log probabilities where wanted.
Does not know: models, KV caches, the mathematics of sampling.
Invariant: nothing waits for the device before `PendingStep.wait`, which is called once.

Rows of a step's logits: one for each sample, then one for each prompt token whose logprob is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from memory_efficient_gpt.padded_steps import sampled_rows
from memory_efficient_gpt.sampling import (
    LogprobTensors,
    Sampled,
    SampleRow,
    SamplingBatch,
    prompt_logprobs,
    sample,
)
from memory_efficient_gpt.sampling.batch import takes_most_likely
from memory_efficient_gpt.sampling.logprobs import copy_to_host
from memory_efficient_gpt.sampling.rng import uniforms
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
) -> PendingStep:
    """Sample from logits `[R, V]` (see the module's docstring for the rows) without waiting.

    end_ids: the model's end-of-sequence tokens. last_tokens `[slots] int64`: each slot's newest token,
    where tokens may not have been read by the host yet.
    """
    pending = PendingStep()
    count = len(step.samples)
    if count:
        rows = [_sample_row(s, end_ids) for s in step.samples]
        batch = SamplingBatch(rows, logits.device, _unread_tokens(step.samples, rows, last_tokens))
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


def simple_choice(step: Step, layout: StepLayout) -> tuple[Choice | None, RowsToSample]:
    """What a graph needs to know of a step's samples, and whether it can choose their tokens itself.

    It can't (None) if any row wants logprobs, filters or changed logits.
    """
    rows = np.asarray([layout.query_starts[s.chunk + 1] - 1 for s in step.samples], dtype=np.int32)
    slots = np.asarray([s.seq.slot for s in step.samples], dtype=np.int32)
    if not all(map(_plain, step.samples)):
        return None, RowsToSample(rows, slots)
    params = [sample.seq.request.params for sample in step.samples]
    temperatures = [0.0 if takes_most_likely(p) else p.temperature for p in params]
    if not any(temperatures):
        return Choice.GREEDY, RowsToSample(rows, slots)
    numbers = uniforms([s.seq.seed for s in step.samples], [s.output_index for s in step.samples])
    return Choice.DRAW, RowsToSample(rows, slots, np.asarray(temperatures, dtype=np.float32), numbers)


def _plain(sample: Sample) -> bool:
    """Whether the token is the most likely one, or drawn by temperature from the model's own logits."""
    params = sample.seq.request.params
    if params.penalized or params.logit_bias or params.logprobs is not None:
        return False
    if sample.output_index < params.min_tokens:
        return False
    return takes_most_likely(params) or (params.top_k is None and params.top_p == 1.0 and not params.min_p)


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
