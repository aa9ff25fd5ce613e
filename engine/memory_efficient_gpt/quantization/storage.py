"""Quantized weights as tensors, in one layout whatever kernel computes with them.

Purpose: `QuantizedWeight` (codes, scales, offsets), its exact meaning, and its packing into bytes.
Does not know: how codes were chosen, modules, kernels' own layouts.
Invariant: `dequantize` defines the numbers; every kernel and file must agree with it.

    weight[n, k] = unit * (scale[n, g] * code[n, k] - offset[n, g]),   g = k // group_size

A symmetric scheme has no offsets: offset = scale * middle code. Scales and offsets are float16; `unit`, a
power of two, keeps them within float16's normal range however small or large the weights are. Two codes of
4 bits share a byte, the even input in the low half.

Letters: N outputs, K inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from memory_efficient_gpt.quantization.scheme import Scheme

_TARGET_SCALE_EXPONENT = (
    -3
)  # the largest scale lies in 2^-4 .. 2^-3: room for offsets of 255 scales, and below


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight `[N, K]`.

    codes: `[N, ceil(K / 2)] uint8` for 4 bits, `[N, K] uint8` for 8, `[N, K] float8_e4m3fn` for fp8.
    scales: `[N, G] float16`; `[1, 1]` for a scheme with one scale a tensor. offsets: likewise, or None.
    unit: `[] float32`.
    """

    scheme: Scheme
    num_inputs: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    unit: torch.Tensor

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in a file."""
        named = {"codes": self.codes, "scales": self.scales, "offsets": self.offsets, "unit": self.unit}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def integer_codes(self) -> torch.Tensor:
        """Codes one a byte, `[N, K] uint8`. Only for integer schemes."""
        return unpack_nibbles(self.codes, self.num_inputs) if self.scheme.bits == 4 else self.codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[N, K]`, computed in float32 (float64 when that is asked for)."""
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        unit, scales = self.unit.to(compute), self.scales.to(compute)
        if self.scheme.kind == "fp8":
            return (self.codes.to(compute) * (scales * unit)).to(dtype)
        offsets = self.offsets.to(compute) if self.offsets is not None else scales * self.scheme.middle
        codes = self.integer_codes().to(compute)
        weight = codes * self._expand(scales) - self._expand(offsets)
        return (weight * unit).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        offsets = self.offsets.to(device) if self.offsets is not None else None
        return QuantizedWeight(
            self.scheme,
            self.num_inputs,
            self.codes.to(device),
            self.scales.to(device),
            offsets,
            self.unit.to(device),
        )

    def select(self, rows: torch.Tensor) -> QuantizedWeight:
        """The weight of outputs `rows` `[T] int64`."""

        def of(values: torch.Tensor) -> torch.Tensor:
            return values[rows] if len(values) > 1 or self.num_outputs == 1 else values

        offsets = of(self.offsets) if self.offsets is not None else None
        return QuantizedWeight(
            self.scheme, self.num_inputs, self.codes[rows], of(self.scales), offsets, self.unit
        )

    def _expand(self, values: torch.Tensor) -> torch.Tensor:
        """`[N, G]` to what broadcasts against `[N, K]`."""
        size = self.scheme.group_size
        return values.repeat_interleave(size, dim=1)[:, : self.num_inputs] if size else values


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[N, K]` codes 0..15 to `[N, ceil(K / 2)] uint8`; an odd K ends with an empty half."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: `[N, K] uint8`."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1)
    return both.flatten(1)[:, :num_inputs].contiguous()


def choose_unit(largest_scale: float) -> float:
    """The power of two by which scales up to `largest_scale` are divided before they become float16."""
    if largest_scale <= 0.0 or not math.isfinite(largest_scale):
        return 1.0
    return 2.0 ** max(min(math.frexp(largest_scale)[1] - _TARGET_SCALE_EXPONENT, 127), -126)
