"""Token ids as transformers passes them, `[B, T]` padded, and as the engine takes them, one list a text.

Purpose: take padding off prompts, and put results back into one tensor.
Does not know: models, tokenizers, engines.
Invariant: a result's row begins with the row that was given, padding and all.

Letters: B texts, T tokens of the longest prompt, padding counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memory_efficient_gpt.errors import InvalidRequestError


def check_ids(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raises InvalidRequestError unless ids are `[B, T]` integers and the mask, if any, has their shape."""
    kind = str(ids.dtype).removeprefix("torch.")
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise InvalidRequestError(
            f"token ids must be an integer tensor [texts, tokens], got {list(ids.shape)} of {kind}.",
            param="inputs",
        )
    if mask is not None and mask.shape != ids.shape:
        raise InvalidRequestError(
            f"attention_mask has the shape {list(mask.shape)}, the token ids {list(ids.shape)}.",
            param="attention_mask",
        )


def padding_mask(ids: torch.Tensor, pad: int | None, ends: Sequence[int]) -> torch.Tensor:
    """What transformers takes for tokens when no mask is given: all but padding, if nothing else is it."""
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ids.ne(pad)


def without_padding(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The tokens of each row of ids `[B, T]` where mask `[B, T]` is not zero."""
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def appended(ids: torch.Tensor, new: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """ids `[B, T]` with each row's new tokens behind it, `[B, T + most new tokens]`, padded on the right."""
    width = max(map(len, new), default=0)
    rows = [[*tokens, *[pad] * (width - len(tokens))] for tokens in new]
    tail = torch.tensor(rows, dtype=ids.dtype, device=ids.device).view(len(ids), width)
    return torch.cat((ids, tail), dim=1)
