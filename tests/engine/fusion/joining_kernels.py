"""Kernels and a backend that compute what has waited along with what comes next, by torch."""

from __future__ import annotations

import torch

from memory_efficient_gpt.attention.context import LayerCache, StepContext
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.native.deferred_calls import DeferredSum, DeferredTurn
from tests.engine.fusion.test_other_kernels import TorchKernels


class JoiningKernels(TorchKernels):
    """Those of another device, by torch; sums with their norms, too."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.calls |= {"sum_rms_norm": 0}

    def sum_rms_norm(self, terms: DeferredSum, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
        terms.compute()
        return self._done("sum_rms_norm", super().rms_norm(terms.out, weight, eps, style))

    def rms_norm_into(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: str, out: torch.Tensor
    ) -> None:
        out.copy_(self.rms_norm(x, weight, eps, style))

    def rotate_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        for target, turned in zip(out, self.rotate(query, key, cos, sin), strict=True):
            target.copy_(turned)


class JoiningBackend(TorchBackend):
    """Torch's attention, with rotary turns in its write; counts those. wrong: stores keys unturned."""

    def __init__(self, *, wrong: bool = False) -> None:
        self.turned = 0
        self._wrong = wrong

    def turn_and_write(
        self, turn: DeferredTurn, value: torch.Tensor, cache: LayerCache, context: StepContext
    ) -> None:
        turn.compute()
        key = turn.key if self._wrong else turn.outputs[1]
        self.write(key[0].transpose(0, 1), value, cache, context)
        self.turned += 1
