"""What changes logits before a token is chosen: bias, suppression, penalties.

Purpose: logit_bias, min_tokens, repetition, presence and frequency penalties for the rows that use them.
Does not know: temperature, filters, how tokens are chosen.
Invariant: a row that uses no feature keeps its logits bit for bit; the input is never changed.

Order: logit_bias, suppression, repetition, presence and frequency. The repetition penalty counts prompt and
output tokens (Keskar et al., CTRL, 2019, section 4.1: positive logits are divided by it, negative ones multiplied);
presence and frequency penalties count output tokens only and are subtracted, as in the OpenAI API.
"""

from __future__ import annotations

import torch

from memory_efficient_gpt.sampling.batch import Entries, Penalties, SamplingBatch


def adjust(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Adjusted logits `[R, V] float32`; the input itself when it is float32 and nothing changes it."""
    adjusted = logits.float()
    if not batch.adjusts:
        return adjusted
    if adjusted is logits:
        adjusted = logits.clone()
    if batch.bias is not None:
        entries, values = batch.bias
        adjusted.index_put_((entries.rows, entries.ids), values, accumulate=True)
    if batch.suppressed is not None:
        never = torch.full((), -torch.inf, device=logits.device)
        adjusted.index_put_((batch.suppressed.rows, batch.suppressed.ids), never)
    if batch.penalties is not None:
        penalized = _penalize(adjusted.index_select(0, batch.penalties.rows), batch.penalties)
        adjusted.index_copy_(0, batch.penalties.rows, penalized)
    return adjusted


def _penalize(logits: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """`[P, V] float32`, changed in place and returned."""
    counts = _count(logits, penalties.outputs, penalties.pending)
    if penalties.prompt is not None:
        seen = _mark(counts > 0, penalties.prompt)
        factor = torch.where(logits > 0, 1.0 / penalties.repetition, penalties.repetition)
        logits = torch.where(seen, logits * factor, logits)
    logits -= counts * penalties.frequency
    logits -= counts.clamp_(max=1.0).mul_(penalties.presence)
    return logits


def _count(logits: torch.Tensor, outputs: Entries, pending: torch.Tensor | None) -> torch.Tensor:
    """How often each token is among the outputs: `[P, V] float32`. Whole numbers, so any order adds up alike."""
    counts = torch.zeros_like(logits)
    counts.index_put_((outputs.rows, outputs.ids), torch.ones((), device=logits.device), accumulate=True)
    if pending is not None:
        exists = (pending >= 0).to(counts.dtype)
        counts.scatter_add_(1, pending.clamp(min=0)[:, None], exists[:, None])
    return counts


def _mark(seen: torch.Tensor, entries: Entries) -> torch.Tensor:
    """`seen [P, V] bool` with the entries set, in place."""
    return seen.index_put_((entries.rows, entries.ids), torch.ones((), dtype=torch.bool, device=seen.device))
