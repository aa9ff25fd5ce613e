"""What changes logits before a token is chosen: bias, suppression, penalties.

Purpose: logit_bias, min_tokens, repetition, presence and frequency penalties for the rows that use them.
Does not know: temperature, filters, how tokens are chosen.
Invariant: a token that no feature names keeps its logit bit for bit; the input is never changed.

Order: logit_bias, suppression, repetition, presence and frequency. The repetition penalty counts prompt
and output tokens: positive logits are divided by it, others multiplied. Presence and frequency penalties
count output tokens only and are subtracted, as in the OpenAI API. A token's logit x becomes
    rep(x) - count * frequency - min(count, 1) * presence
where count is how often it is among the row's outputs. Only named tokens are computed, so the cost
follows the length of the texts and not rows * vocabulary.
"""

from __future__ import annotations

import torch

from memory_efficient_gpt.sampling.batch import Penalties, SamplingBatch


def adjust(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Adjusted logits `[R, V] float32`; the input itself when it is float32 and nothing changes it."""
    adjusted = logits.float()
    if not batch.adjusts:
        return adjusted
    if adjusted is logits:
        adjusted = logits.clone(memory_format=torch.contiguous_format)
    flat = adjusted.view(-1)
    size = logits.shape[-1]
    if batch.bias is not None:
        entries, values = batch.bias
        flat.index_add_(0, entries.rows * size + entries.ids, values)
    if batch.suppressed is not None:
        flat.index_fill_(0, batch.suppressed.rows * size + batch.suppressed.ids, -torch.inf)
    if batch.penalties is not None:
        _penalize(flat, size, batch.penalties)
    return adjusted


def _penalize(flat: torch.Tensor, size: int, penalties: Penalties) -> None:
    """Penalize logits `flat [R * V]` in place.

    All values are computed before the first is written. Prompt tokens are written first, as if absent
    from the outputs; the outputs' tokens overwrite them, and the pending token overwrites both. Repeated
    prompt tokens write the same value, and the other two lists have no repeats.
    """
    writes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for entries, counts in ((penalties.prompt, None), (penalties.outputs, penalties.counts)):
        if entries is not None:
            places = penalties.rows[entries.rows] * size + entries.ids
            writes.append((places, _penalized(flat[places], entries.rows, counts, penalties)))
    pending = None if penalties.pending is None else _pending(flat, size, penalties, penalties.pending)
    for places, values in writes:
        flat.index_copy_(0, places, values)
    if pending is not None:
        places, values, exists = pending
        flat.index_copy_(0, places, torch.where(exists, values, flat[places]))


def _penalized(
    logits: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor | None, penalties: Penalties
) -> torch.Tensor:
    """New values of `logits [E]` of penalized rows `rows [E]`; counts None: not in the outputs."""
    repetition = penalties.repetition[rows]
    values = torch.where(logits > 0, logits / repetition, logits * repetition)
    if counts is None:
        return values
    return values - counts * penalties.frequency[rows] - counts.clamp(max=1.0) * penalties.presence[rows]


def _pending(
    flat: torch.Tensor, size: int, penalties: Penalties, pending: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pending tokens' places `[P]`, new values `[P]`, and whether there is such a token `[P] bool`."""
    exists = pending >= 0
    counts = exists.float()
    if penalties.outputs is not None and penalties.counts is not None:
        hits = penalties.outputs.ids == pending[penalties.outputs.rows]
        counts.index_add_(0, penalties.outputs.rows, hits * penalties.counts)  # whole numbers: exact
    places = penalties.rows * size + pending.clamp(min=0)
    rows = torch.arange(len(pending), device=pending.device)
    return places, _penalized(flat[places], rows, counts, penalties), exists
