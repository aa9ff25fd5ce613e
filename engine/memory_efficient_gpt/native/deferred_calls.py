"""What may wait for the next call: residual sums, norms over heads, rotary turns.

Purpose: each call's inputs and the tensors for its results, and how it is computed by itself.
Does not know: how and when calls wait (deferral.py), devices.
Invariant: a call holds all that it needs; `outputs` have no contents until it is computed.

Letters: T tokens, H heads (Hq of queries, Hk of keys), D elements of a head, P of them that turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from memory_efficient_gpt.native.ops import NormStyle


@runtime_checkable
class TurningKernels(Protocol):
    """Kernels whose rotary turns can wait."""

    def rotate_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """As `LayerKernels.rotate`, into tensors like those of `unturned`."""


@dataclass(frozen=True, slots=True, eq=False)
class DeferredSum:
    """out = left + right, contiguous tensors alike."""

    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors without contents."""
        return (self.out,)

    def compute(self) -> None:
        """By itself."""
        torch.add(self.left, self.right, out=self.out)


@runtime_checkable
class HeadNormKernels(Protocol):
    """Kernels whose norms over heads can wait."""

    def rms_norm_into(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: NormStyle, out: torch.Tensor
    ) -> None:
        """As `LayerKernels.rms_norm`, into a contiguous tensor like x."""


@dataclass(frozen=True, slots=True, eq=False)
class DeferredHeadNorm:
    """out = RMS norm of x `[1, T, H, D]` or `[1, H, T, D]` over D, with weight `[D]`; out is contiguous."""

    kernels: HeadNormKernels
    x: torch.Tensor
    weight: torch.Tensor
    eps: float
    style: NormStyle
    out: torch.Tensor

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors without contents."""
        return (self.out,)

    def compute(self) -> None:
        """By itself."""
        self.kernels.rms_norm_into(self.x, self.weight, self.eps, self.style, self.out)

    def source_of(self, normed: torch.Tensor) -> torch.Tensor:
        """x as `normed` `[1, H, T, D]` sees out: as it is, or with heads before tokens."""
        return self.x if normed is self.out else self.x.transpose(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class DeferredTurn:
    """query `[1, Hq, T, D]` and key `[1, Hk, T, D]` to be turned by cos and sin `[1, T, P]` into `outputs`.

    These have the same shapes and are views of contiguous `[1, T, H, D]`. norms: those that give query and
    key, of one style, if they have not been computed yet.
    """

    kernels: TurningKernels
    query: torch.Tensor
    key: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]
    norms: tuple[DeferredHeadNorm, DeferredHeadNorm] | None = None

    def compute(self) -> None:
        """By itself, after its norms."""
        for norm in self.norms or ():
            norm.compute()
        self.kernels.rotate_into(self.query, self.key, self.cos, self.sin, self.outputs)
