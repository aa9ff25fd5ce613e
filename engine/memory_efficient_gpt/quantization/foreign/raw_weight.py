"""A weight as formats of other libraries mean it, and its way into our layout.

Purpose: one form between the formats and `QuantizedWeight`: codes, scales and zero points, one row an output.
Does not know: files, names of tensors, models.
Invariant: codes are kept bit for bit. Scales in float16 or bfloat16 are kept exactly (bfloat16 ones down to
2^-13 of the largest); float32 ones are rounded to float16, one for the whole tensor is not.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),   g = k // group_size

Our offsets are scale * zero in float16: off by 2^-11 of themselves at most, which is 0.007 of a 4-bit step
and 0.12 of an 8-bit one. A zero point in the middle everywhere makes the scheme symmetric and exact.

Letters: N outputs, K inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.quantization.scheme import FP8, Granularity, Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight, choose_unit, pack_nibbles

_HALF_MAX: Final = 65504.0


@dataclass(frozen=True, slots=True)
class RawWeight:
    """A weight `[N, K]`.

    codes: as in QuantizedWeight, of `bits` 4 or 8 or of fp8. scales: `[N, G]`, or `[1, 1]` for one a tensor.
    zeros: likewise, integers; None for fp8. group_size: None if a row, or all, share one scale.
    order: `[K]`; column j of the codes is of input order[j]. None: they are in order.
    """

    num_inputs: int
    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int | None = None
    order: torch.Tensor | None = None

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale for all outputs."""
        return self.scales.shape[0] == 1 and self.codes.shape[0] > 1

    def quantized(self) -> QuantizedWeight:
        """The same weight in our layout; `order` is the caller's business."""
        unit = self._unit()
        scales = (self.scales.float() / unit).half()
        if self.zeros is None:
            rows = scales.expand(len(self.codes), -1).contiguous()
            return QuantizedWeight(FP8, self.num_inputs, self.codes, rows, None, torch.tensor(unit))
        middle = 1 << (self.bits - 1)
        symmetric = bool((self.zeros == middle).all())
        offsets = None if symmetric else (self.scales.float() / unit * self.zeros.float()).half()
        granularity: Granularity = "group" if self.group_size else "tensor" if self.per_tensor else "channel"
        scheme = Scheme("int", self.bits, symmetric, granularity, self.group_size)
        return QuantizedWeight(scheme, self.num_inputs, self.codes, scales, offsets, torch.tensor(unit))

    def _unit(self) -> float:
        """What makes the stored scales exact if anything does."""
        largest = float(self.scales.abs().max())
        if self.per_tensor and largest > 0.0:
            return float(self.scales.float())
        if self.scales.dtype is torch.float16 and largest * (1 << self.bits) < _HALF_MAX:
            return 1.0
        return choose_unit(largest)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[N, K] uint8` as QuantizedWeight keeps codes of 4 or 8 bits."""
    return pack_nibbles(codes) if bits == 4 else codes


def widen(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (or zero points) of 2 or 3 bits as ones of 4 bits whose middle is 8; others as they are.

    Code and zero point move together, so that the weight stays the same.
    """
    return codes + (8 - (1 << (bits - 1))) if bits < 4 else codes


def concatenate(weights: Sequence[RawWeight]) -> RawWeight:
    """One weight of the outputs of all. They must be alike in bits, group size and inputs, and in order."""
    first = weights[0]
    assert all(w.order is None for w in weights), "stacks have no input order"
    rows = [w.scales.float().expand(len(w.codes), -1) if w.per_tensor else w.scales for w in weights]
    zeros = [w.zeros.expand(len(w.codes), -1) for w in weights if w.zeros is not None]
    return RawWeight(
        first.num_inputs,
        first.bits,
        _join([w.codes for w in weights]),
        torch.cat(rows),
        torch.cat(zeros) if zeros else None,
        first.group_size,
    )


def _join(codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.cat, also for float8, which it does not know on every device."""
    return torch.cat([c.view(torch.uint8) for c in codes]).view(codes[0].dtype)
