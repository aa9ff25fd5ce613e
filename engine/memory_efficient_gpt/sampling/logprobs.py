"""Log probabilities of chosen and most likely tokens.

Purpose: logprobs and prompt_logprobs, as tensors and then as plain data.
Does not know: sampling parameters other than how many alternatives are wanted.
Invariant: they are of the model's own distribution, log softmax of its raw logits, whatever bias, penalties,
temperature or filters chose the token; a row's are the same bits beside any others.

Letters: L rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.request import TokenLogprob

LEAST_LOGPROB: Final = -9999.0
"""Stands for the logarithm of zero, which JSON cannot express."""

_MAX_ELEMENTS: Final = 1 << 22  # bounds the copies made of a long prompt's logits


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """ids `[L] int64` and their logprobs `[L] float32`; top_ids `[L, K] int64` and top_logprobs
    `[L, K] float32`, most likely first. Logprobs are at least LEAST_LOGPROB."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def to_host(self) -> LogprobTensors:
        """A copy in (pinned) host memory, enqueued without waiting: see `copy_to_host`."""
        return LogprobTensors(
            copy_to_host(self.ids),
            copy_to_host(self.logprobs),
            copy_to_host(self.top_ids),
            copy_to_host(self.top_logprobs),
        )

    def entries(self, counts: Sequence[int] | None = None) -> list[TokenLogprob]:
        """One entry a row, with at most counts[row] alternatives (None: all K). Waits for the device."""
        ids, logprobs = self.ids.tolist(), self.logprobs.tolist()
        tops = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        pairs = [tuple(zip(*top, strict=True)) for top in tops]
        if counts is not None:
            pairs = [top[:count] for top, count in zip(pairs, counts, strict=True)]
        return [TokenLogprob(*entry) for entry in zip(ids, logprobs, pairs, strict=True)]


def gather_logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int) -> LogprobTensors:
    """Logprobs of `ids [L]` and of the k likeliest tokens under raw logits `[L, V]` (any float dtype)."""
    logits = logits.float()
    norm = _log_sum_exp(logits)
    chosen = (logits.gather(1, ids[:, None]) - norm).squeeze(1)
    top_ids = _likeliest(logits, min(k, logits.shape[-1]))
    top = logits.gather(1, top_ids)
    return LogprobTensors(
        ids=ids,
        logprobs=chosen.clamp_(min=LEAST_LOGPROB),
        top_ids=top_ids,
        top_logprobs=(top - norm).clamp_(min=LEAST_LOGPROB),
    )


def prompt_logprobs(logits: torch.Tensor, target_ids: torch.Tensor, k: int) -> LogprobTensors:
    """Logprobs of each prompt token `target_ids [T]` under the logits `[T, V]` of the position before it.

    Works through long prompts in pieces: its own memory stays within some 64 MiB.
    """
    rows = max(1, _MAX_ELEMENTS // logits.shape[-1])
    parts = [
        gather_logprobs(logits[start : start + rows], target_ids[start : start + rows], k)
        for start in range(0, max(1, len(target_ids)), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return LogprobTensors(
        ids=target_ids,
        logprobs=torch.cat([part.logprobs for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
    )


def _likeliest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids `[L, k] int64` of the largest of `[L, V] float32`, in falling order; of equals the lower id, where
    torch's choice depends on what else is asked for."""
    bits = (logits + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # in the order of the numbers
    last = logits.shape[1] - 1
    keys = bits.long().bitwise_left_shift_(32)
    keys += last - torch.arange(last + 1, device=logits.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Of each row of `[L, V] float32`: `[L, 1]`; halves are added to halves, since torch's order of a sum
    depends on the number of rows."""
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    parts = (logits - top).exp_()
    while (width := parts.shape[1]) > 1:
        half = (width + 1) // 2
        parts[:, : width - half] += parts[:, half:]
        parts = parts[:, :half]
    return parts.log() + top


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory that the device fills in stream order; the tensor itself if it is on the CPU.

    Read it only behind an event recorded after this call.
    """
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
