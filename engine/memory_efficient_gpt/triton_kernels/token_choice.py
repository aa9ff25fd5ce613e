"""The launch of the kernel that chooses tokens.

Purpose: from logits and each row's parameters to tokens, by one kernel.
Does not know: penalties, seeds, where logits come from.
Invariant: no host synchronization, so launches can be captured in a CUDA graph; sizes of tiles depend on the
vocabulary only, and a row's token on that row.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
import triton

from memory_efficient_gpt.triton_kernels.token_choice_kernel import choose_kernel

_BLOCK: Final = 8192
_CUT_BLOCK: Final = 2048
"""Tokens of a tile, and where seven sums are made at once."""
_WARPS: Final = 16


class Parameters(Protocol):
    """How each row is chosen (sampling/batch.py)."""

    @property
    def temperature(self) -> torch.Tensor: ...
    @property
    def min_p(self) -> torch.Tensor: ...
    @property
    def top_k(self) -> torch.Tensor: ...
    @property
    def top_p(self) -> torch.Tensor: ...
    @property
    def uniform(self) -> torch.Tensor: ...


def choose(
    logits: torch.Tensor,
    parameters: Parameters | None,
    tokens: torch.Tensor,
    usable: torch.Tensor,
    kept: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """A token for each row of logits `[R, V]` (any float dtype) into tokens `[R] int64`.

    parameters: None takes the most likely tokens. usable `[R] uint8`: 0 (and token 0) where a row has NaN
    or +inf, or nothing above -inf. kept `[slots + 1] int64`, slots `[R] int32`: where else each token is
    written; rows of the last slot are padding, for which nothing is computed.
    """
    rows, size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    p, any_ = parameters, tokens  # what is not read is any tensor
    values: tuple[Any, ...] = (any_,) * 5
    if p is not None:
        values = (p.temperature, p.min_p, p.top_k, p.top_p, p.uniform)
    no_slot = -1 if kept is None else len(kept) - 1
    with torch.cuda.device(logits.device):
        choose_kernel[(rows,)](
            logits, *values, any_ if slots is None else slots, any_ if kept is None else kept, tokens, usable,
            logits.stride(0), no_slot, V=size, draws=p is not None, keeps=kept is not None, BLOCK=_BLOCK,
            CUT=_CUT_BLOCK, TILES=triton.next_power_of_2(-(-size // _BLOCK)), num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
