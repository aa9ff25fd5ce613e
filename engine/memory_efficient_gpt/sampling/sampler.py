"""One step's logits in, one token a row out.

Purpose: put adjustment, choice and logprobs in order, and skip what no row asks for.
Does not know: requests, scheduling, text.
Invariant: never waits for the device; a row with unusable logits fails alone.

What a user gets, in this order: logit_bias, suppression (min_tokens), repetition penalty, presence and
frequency penalties; then the most likely token for greedy rows, and for the others temperature, min_p,
top_k, top_p, and a draw. Logprobs are of the raw logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memory_efficient_gpt.request import TokenLogprob
from memory_efficient_gpt.sampling.adjust import adjust
from memory_efficient_gpt.sampling.batch import SamplingBatch
from memory_efficient_gpt.sampling.draw import draw_tokens
from memory_efficient_gpt.sampling.logprobs import LogprobTensors, copy_to_host, gather_logprobs
from memory_efficient_gpt.sampling.ordering import argmax


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids `[R] int64` and ok `[R] bool`: False (and token 0) where a row's logits hold NaN or +inf, or
    nothing above -inf. `logprobs` has a row for each of `logprob_rows`; None when no row wants any."""

    token_ids: torch.Tensor
    ok: torch.Tensor
    logprobs: LogprobTensors | None = None
    logprob_rows: tuple[int, ...] = ()
    logprob_counts: tuple[int, ...] = ()

    def to_host(self) -> Sampled:
        """Enqueue copies to the host; read them only behind an event recorded after this call."""
        return Sampled(
            copy_to_host(self.token_ids),
            copy_to_host(self.ok),
            self.logprobs.to_host() if self.logprobs is not None else None,
            self.logprob_rows,
            self.logprob_counts,
        )

    def token_logprobs(self) -> list[TokenLogprob | None]:
        """Plain data, one for each of the R rows, None where none was asked for; of the host's copy."""
        result: list[TokenLogprob | None] = [None] * len(self.token_ids)
        if self.logprobs is not None:
            entries = self.logprobs.entries(self.logprob_counts)
            for row, entry in zip(self.logprob_rows, entries, strict=True):
                result[row] = entry
        return result


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """Choose a token for every row of logits `[R, V]` (any float dtype), which stay unchanged."""
    assert logits.shape[0] == batch.num_rows, (logits.shape, batch.num_rows)
    plain = batch.draw is None and not batch.adjusts
    adjusted = logits if plain else adjust(logits, batch)
    token_ids, ok = (_by_kernel if batch.kernel else _by_torch)(adjusted, batch)
    if batch.adjusts:
        ok &= logits.amax(-1).isfinite()  # suppression may have hidden a NaN
    token_ids = torch.where(ok, token_ids, 0)
    return Sampled(
        token_ids,
        ok,
        _chosen_logprobs(logits, token_ids, batch) if batch.logprob_rows else None,
        batch.logprob_rows,
        batch.logprob_counts,
    )


def _by_torch(adjusted: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[R] int64`, and whether each row's logits `[R, V]` were usable, `[R] bool`."""
    best = argmax(adjusted)
    top = adjusted.gather(1, best[:, None])
    ok = top.squeeze(1).isfinite()
    return best if batch.draw is None else _draw(adjusted, best, top, batch), ok


def _by_kernel(adjusted: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `_by_torch` by one launch."""
    from memory_efficient_gpt.triton_kernels.token_choice import choose

    tokens = torch.empty(len(adjusted), dtype=torch.int64, device=adjusted.device)
    usable = torch.empty(len(adjusted), dtype=torch.uint8, device=adjusted.device)
    choose(adjusted, batch.parameters, tokens, usable)
    return tokens, usable.view(torch.bool)


def _draw(
    adjusted: torch.Tensor, best: torch.Tensor, top: torch.Tensor, batch: SamplingBatch
) -> torch.Tensor:
    """Tokens `[R] int64`: drawn where a row draws, `best` elsewhere."""
    assert batch.draw is not None
    rows = batch.draw.rows
    if rows is None:
        return draw_tokens(adjusted, top, batch.draw).squeeze(1)
    drawn = draw_tokens(adjusted.index_select(0, rows), top.index_select(0, rows), batch.draw)
    return best.index_copy(0, rows, drawn.squeeze(1))


def _chosen_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, batch: SamplingBatch) -> LogprobTensors:
    index = batch.logprob_index
    if index is not None:
        logits, token_ids = logits.index_select(0, index), token_ids.index_select(0, index)
    return gather_logprobs(logits, token_ids, max(batch.logprob_counts))
