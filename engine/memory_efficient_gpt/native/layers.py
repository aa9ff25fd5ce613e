"""Layers of a model that compute with kernels of ours, as classes to mix into the layer's own class.

Purpose: the `forward` of linear layers, norms, gated MLPs and routed experts, and what they ask of kernels.
Does not know: which modules of a model may take them (fusion decides).
Invariant: parameters stay where they are; with gradients enabled, on another device or in another dtype, a
layer computes with its own class's `forward`.

Letters: T tokens, D hidden size, K inputs, N outputs, E experts, I inner size, k experts of a token.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Protocol, cast, runtime_checkable

import torch
from torch import nn

from memory_efficient_gpt.native.deferral import Deferral, current_deferral
from memory_efficient_gpt.native.deferred_calls import DeferredHeadNorm, DeferredSum, HeadNormKernels
from memory_efficient_gpt.native.expert_stacks import NativeStack
from memory_efficient_gpt.native.ops import Activation, Kernels, NormStyle

DTYPES: Final = (torch.float32, torch.bfloat16)


class LayerKernels(Protocol):
    """Kernels of one kind of device for the layers between products: the native C++ ones, or Triton's.

    label: what people read. device_type and dtypes: of the tensors they take. deterministic: whether a row's
    result never depends on how many others there are.
    """

    @property
    def label(self) -> str: ...
    @property
    def device_type(self) -> str: ...
    @property
    def dtypes(self) -> frozenset[torch.dtype]: ...
    @property
    def deterministic(self) -> bool: ...

    def multiplies(self, weight: torch.Tensor) -> bool:
        """Whether `linear` has a kernel for weight `[N, K]`."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., K]` times weight `[N, K]` transposed, plus bias `[N]`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: NormStyle) -> torch.Tensor:
        """x `[..., D]` over its root mean square, times weight `[D]`."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(gate) * up for `[..., D]`."""

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query and key `[1, H, T, D]` turned by cos and sin `[1, T, P]`, P <= D, as new tensors."""


@runtime_checkable
class SumNormKernels(Protocol):
    """Kernels that compute a norm along with the sum before it."""

    def sum_rms_norm(
        self, terms: DeferredSum, weight: torch.Tensor, eps: float, style: NormStyle
    ) -> torch.Tensor:
        """`rms_norm` of the sum, which is rounded to the dtype and written to `terms.out`."""


class Stack(Protocol):
    """Experts' weights `[E, N, K]` that are not a plain tensor."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One expert's weight `[N, K]`."""

    def native_stack(self) -> NativeStack | None:
        """As the native library takes it, if it does."""


class NativeLayer(nn.Module):
    """Base of the classes below; the attributes are set on a module by `become`."""

    native_kernels: LayerKernels
    native_settings: dict[str, Any]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the kernels may take x: its device and dtype are theirs, there is no gradient to record."""
        kernels = self.native_kernels
        right = x.device.type == kernels.device_type and x.dtype in kernels.dtypes
        return right and not torch.is_grad_enabled()

    def can_compute(self, x: torch.Tensor, weight: torch.Tensor | Stack) -> bool:
        """Likewise, and the weight has x's dtype."""
        return x.dtype is weight.dtype and self.takes(x)


class NativeLinear(NativeLayer):
    """As nn.Linear."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` to `[..., N]`."""
        if self.can_compute(x, self.weight):
            return self.native_kernels.linear(x, self.weight, self.bias)
        return cast(torch.Tensor, super().forward(x))


class NativeConv1D(NativeLayer):
    """As a linear layer with weight `[K, N]`, kept in memory as its transpose."""

    native_kernels: Kernels
    weight: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` to `[..., N]`."""
        if self.can_compute(x, self.weight) and self.weight.stride(0) == 1:
            return self.native_kernels.linear(x, self.weight.t(), self.bias)
        return cast(torch.Tensor, super().forward(x))


class NativeRMSNorm(NativeLayer):
    """As any RMS norm over the last dimension with one weight."""

    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., D]` to `[..., D]`."""
        if self.can_compute(x, self.weight):
            deferral = current_deferral()
            if deferral is not None and (result := self._joined(x, deferral)) is not None:
                return result
            return self.native_kernels.rms_norm(x, self.weight, **self.native_settings)
        return cast(torch.Tensor, super().forward(x))

    def _joined(self, x: torch.Tensor, deferral: Deferral) -> torch.Tensor | None:
        """The result with the sum that gives x, or one that waits for rotary positions; None for neither."""
        kernels, settings = self.native_kernels, self.native_settings
        if isinstance(kernels, SumNormKernels) and (terms := deferral.take(DeferredSum, x)) is not None:
            return kernels.sum_rms_norm(terms, self.weight, **settings)
        heads = x.dim() == 4 and x.shape[0] == 1 and x.numel() > 0
        if heads and deferral.defers("head_norms") and isinstance(kernels, HeadNormKernels):
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return deferral.put_norm(DeferredHeadNorm(kernels, x, self.weight, out=out, **settings))
        return None


class NativeGatedMLP(NativeLayer):
    """down(activation(gate(x)) * up(x)), gate and up being two layers or the halves of one."""

    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., D]` to `[..., D]`."""
        if not self.takes(x):
            return cast(torch.Tensor, super().forward(x))
        modules = self._modules
        if (merged := modules.get("gate_up_proj")) is not None:
            gate, up = merged(x).chunk(2, dim=-1)
        else:
            gate, up = modules["gate_proj"](x), modules["up_proj"](x)  # type: ignore[misc]  # never None
        inner = self.native_kernels.gated(gate, up, **self.native_settings)
        return cast(torch.Tensor, self.down_proj(inner))


class NativeExperts(NativeLayer):
    """Routed gated MLPs, weights stacked: gate_up_proj `[E, 2 I, D]`, down_proj `[E, D, I]`."""

    native_kernels: Kernels
    gate_up_proj: torch.Tensor | Stack
    down_proj: torch.Tensor | Stack

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x `[T, D]`, index and weights `[T, k]` to `[T, D]`; a token's experts are summed in float32."""
        if not self.can_compute(x, self.down_proj):
            return cast(torch.Tensor, super().forward(x, index, weights))
        gate_up, down = _stack_of(self.gate_up_proj), _stack_of(self.down_proj)
        if gate_up is not None and down is not None:
            return self.native_kernels.experts(x, index, weights, gate_up, down, **self.native_settings)
        return self._one_by_one(x, index, weights)

    def _one_by_one(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Where a stack is in no layout of the library's: it is dequantized expert by expert."""
        num_experts, k = self.down_proj.shape[0], index.shape[1]
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=num_experts).tolist()
        results = x.new_zeros((chosen.shape[0], x.shape[1]))
        start = 0
        for expert, count in enumerate(counts[:num_experts]):  # beyond them: "no expert", adds nothing
            if count == 0:
                continue
            places = order[start : start + count]
            start += count
            gate, up = self._multiply(x[places // k], self.gate_up_proj, expert).chunk(2, dim=-1)
            inner = self.native_kernels.gated(gate, up, **self.native_settings)
            results[places] = self._multiply(inner, self.down_proj, expert)
        weighted = results.view(-1, k, x.shape[1]).float() * weights.float().unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)

    def _multiply(self, x: torch.Tensor, weights: torch.Tensor | Stack, expert: int) -> torch.Tensor:
        """x `[T, K]` times one expert's weight transposed."""
        return self.native_kernels.linear(x, weights[expert])


def _stack_of(weights: torch.Tensor | Stack) -> NativeStack | None:
    """As the library takes it, if it does."""
    if not isinstance(weights, torch.Tensor):
        return weights.native_stack()
    return NativeStack(weights, weights.shape[0]) if weights.is_contiguous() else None


def become(
    module: nn.Module, layer: type[NativeLayer], kernels: LayerKernels, settings: dict[str, Any]
) -> None:
    """Change the class of `module` to a subclass that computes as `layer`; the instance stays the same.

    To undo it, assign the former class to `module.__class__`.
    """
    module.native_kernels = kernels  # type: ignore[assignment]  # not a tensor and not a module
    module.native_settings = settings  # type: ignore[assignment]  # likewise
    module.__class__ = _subclass(layer, type(module))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _subclass(layer: type[NativeLayer], own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Native{own.__name__}", (layer, own), {"__module__": own.__module__})
