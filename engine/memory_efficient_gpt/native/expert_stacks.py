"""Routed experts by the native library.

Purpose: check what is given, describe stacked weights to the library, call it.
Does not know: modules, how experts are chosen.
Invariant: nothing is read of the choices here, so a call can be recorded.

Letters: T tokens, k experts of a token, E experts, N and K of one's weight, D hidden size, I inner size.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch

from memory_efficient_gpt.native.build import NativeLibrary
from memory_efficient_gpt.native.checks import DTYPE_CODES, describe
from memory_efficient_gpt.native.packed_weight import BLOCK, PackedWeight
from memory_efficient_gpt.native.replay import Function, NativeFunction


class _StackSizes(ctypes.Structure):
    """MegptStack of experts.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("codes", "scales", "offsets")),
        *((name, c_int64) for name in ("codes_bytes", "scales_bytes", "offsets_bytes")),
        *((name, c_int64) for name in ("bits", "span", "spans", "per_group")),
        ("unit", c_double),
    ]


class _ExpertsSizes(ctypes.Structure):
    """MegptExpertsSizes of experts.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("T", "k", "E", "D", "I", "activation", "dtype", "threads")),
        ("gate_up", _StackSizes),
        ("down", _StackSizes),
    ]


@dataclass(frozen=True, slots=True)
class NativeStack:
    """Weights `[E, N, K]`: a contiguous tensor, or packed as one weight of E * N outputs, N whole blocks."""

    weight: torch.Tensor | PackedWeight
    num_experts: int

    @property
    def num_outputs(self) -> int:
        """N."""
        packed = isinstance(self.weight, PackedWeight)
        return self.weight.num_outputs // self.num_experts if packed else self.weight.shape[1]  # type: ignore[union-attr]

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.weight.num_inputs if isinstance(self.weight, PackedWeight) else self.weight.shape[2]

    def sizes(self) -> _StackSizes:
        """For the library. Raises ValueError for a stack that it does not take."""
        weight = self.weight
        if isinstance(weight, torch.Tensor):
            if not weight.is_contiguous() or weight.dim() != 3:
                raise ValueError(f"experts need contiguous weights [E, N, K], got {describe(weight)}")
            return _StackSizes(codes=weight.data_ptr(), codes_bytes=weight.stride(0) * weight.element_size())
        if self.num_outputs % BLOCK:
            raise ValueError(f"experts of {self.num_outputs} outputs are no whole blocks of {BLOCK}")
        blocks = self.num_outputs // BLOCK
        tensors = {"codes": weight.codes, "scales": weight.scales, "offsets": weight.offsets}
        fields: dict[str, int] = {}
        for name, tensor in tensors.items():
            if tensor is not None:
                fields |= {name: tensor.data_ptr()}
                fields |= {f"{name}_bytes": blocks * tensor.stride(0) * tensor.element_size()}
        return _StackSizes(
            **fields, bits=weight.bits, span=weight.span, spans=weight.num_spans, per_group=weight.per_group,
            unit=weight.unit,
        )  # fmt: skip


class ExpertsFunction:
    """megpt_experts of a library."""

    def __init__(self, library: NativeLibrary) -> None:
        self._call = NativeFunction(
            library.cdll.megpt_experts, Function.EXPERTS, [c_void_p] * 5, _ExpertsSizes
        )

    def __call__(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: NativeStack,
        down: NativeStack,
        activation: int,
        threads: int,
    ) -> torch.Tensor:
        """See `Kernels.experts`."""
        t, d = x.shape
        inner = down.num_inputs
        fits = gate_up.num_inputs == d == down.num_outputs and gate_up.num_outputs == 2 * inner
        if not fits or index.shape != weights.shape or index.shape[0] != t:
            raise ValueError(
                "experts need x [T, D], choices [T, k] and stacks [E, 2 I, D] and [E, D, I]; got "
                f"{describe(x)}, "
                f"{describe(index)}, N x K {gate_up.num_outputs} x {gate_up.num_inputs} and "
                f"{down.num_outputs} x {inner}"
            )
        x, index, weights = x.contiguous(), index.long().contiguous(), weights.float().contiguous()
        out = torch.empty_like(x)
        sizes = _ExpertsSizes(
            t, index.shape[1], gate_up.num_experts, d, inner, activation, DTYPE_CODES[x.dtype], threads,
            gate_up.sizes(), down.sizes(),
        )  # fmt: skip
        self._call(
            out.data_ptr(), x.data_ptr(), index.data_ptr(), weights.data_ptr(), ctypes.addressof(sizes)
        )
        return out
