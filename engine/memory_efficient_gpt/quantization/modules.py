"""Linear layers, embeddings and stacked experts that hold a quantized weight instead of a float one.

Purpose: compute with it, natively where kernels were given, else on the dequantized weight; save and load it.
Does not know: how codes were chosen, which layers of a model become these.
Invariant: a module keeps its identity, bias, hooks and place in the model; only its class changes. State
dicts hold the layout of storage.py, whatever layout the module computes with.

`module.weight` still works: it dequantizes at each access, for code that looks at a weight now and then.
Gradients flow to the inputs (as QLoRA needs), never to the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Self, cast

import torch
from torch import nn
from torch.nn import functional

from memory_efficient_gpt.native.layers import DTYPES
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.native.packed_weight import PackedWeight, dequantize_rows, unpack
from memory_efficient_gpt.native.quantize import pack_stored
from memory_efficient_gpt.quantization.fp8 import fp8_linear, multiplies_fp8, output_scales
from memory_efficient_gpt.quantization.scheme import Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight, pack_nibbles
from memory_efficient_gpt.triton_kernels.packing import TritonWeight

TENSOR_NAMES: Final = ("codes", "scales", "offsets", "unit")
PREFIX: Final = "weight_"
"""A weight's tensors stand in a state dict as weight_codes, weight_scales, weight_offsets, weight_unit."""


class QuantizedModule(nn.Module):
    """Mixed into a module's own class; see `hold`. `compute_dtype` is what the weight was before.

    The weight is in buffers, or packed: for the native kernels once `use_kernels` was called, for the Triton
    ones once `use_triton` was. deterministic: whether its fp8 product on a GPU may not depend on the number
    of rows (a packed weight says so itself).
    """

    deterministic: bool = False

    scheme: Scheme
    num_inputs: int
    compute_dtype: torch.dtype
    native_kernels: Kernels | None
    packed_weight: PackedWeight | TritonWeight | None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight in the layout of storage.py."""
        if self.packed_weight is not None:
            return _stored_layout(self.scheme, self.packed_weight)
        codes, scales, offsets, unit = (self._buffers[PREFIX + name] for name in TENSOR_NAMES)
        assert codes is not None and scales is not None and unit is not None
        return QuantizedWeight(self.scheme, self.num_inputs, codes, scales, offsets, unit)

    @property
    def num_outputs(self) -> int:
        """N."""
        packed, codes = self.packed_weight, self._buffers.get(PREFIX + "codes")
        return packed.num_outputs if packed is not None else len(codes) if codes is not None else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in memory now."""
        packed = self.packed_weight
        if packed is None:
            return self.quantized_weight.num_bytes
        tensors = (packed.codes, packed.scales, packed.offsets)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def set_weight(self, weight: QuantizedWeight | None) -> None:
        """Hold `weight` in buffers; None empties them."""
        tensors = weight.tensors() if weight is not None else {}
        for name in TENSOR_NAMES:
            self.register_buffer(PREFIX + name, tensors.get(name))

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` as the codes want it: in the order of their columns."""
        return x

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[N, K]`."""
        packed = self.packed_weight
        if packed is None:
            return self.quantized_weight.dequantize(dtype)
        return dequantize_packed(packed, None, dtype)

    def use_kernels(self, kernels: Kernels, packed: PackedWeight) -> None:
        """Compute with `packed`, this weight as `pack_weight` gives it, instead of with the buffers."""
        self.packed_weight, self.native_kernels = packed, kernels
        self.set_weight(None)

    def use_triton(self, packed: TritonWeight) -> None:
        """Likewise, with the Triton kernels."""
        self.packed_weight, self.native_kernels = packed, None
        self.set_weight(None)

    def drop_kernels(self) -> None:
        """Go back to the buffers."""
        if self.packed_weight is not None:
            weight = self.quantized_weight
            self.packed_weight = self.native_kernels = None
            self.set_weight(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the weight with the module; the dtypes of its tensors are part of its meaning and stay."""
        packed = self.packed_weight
        device = packed.codes.device if packed is not None else self.quantized_weight.codes.device
        moved = fn(torch.empty(0, dtype=self.compute_dtype, device=device))
        if moved.device != device:
            self.drop_kernels()
        weight = self.quantized_weight if self.packed_weight is None else None
        self.set_weight(None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            self.set_weight(weight.to(moved.device))
        self.compute_dtype = moved.dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_weight is not None:
            for name, tensor in self.quantized_weight.tensors().items():
                destination[prefix + PREFIX + name] = tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Pack what was loaded as the weight before it was."""
        kernels, packed = self.native_kernels, self.packed_weight
        self.drop_kernels()
        super()._load_from_state_dict(*arguments)
        if kernels is not None:
            self.use_kernels(kernels, pack_weight(self.quantized_weight, kernels))
        elif isinstance(packed, TritonWeight):
            from memory_efficient_gpt.quantization.triton_weights import pack_for_triton

            weight = pack_for_triton(self.quantized_weight)
            self.use_triton(replace(weight, deterministic=packed.deterministic))


class QuantizedLinear(QuantizedModule, nn.Linear):
    """As nn.Linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input `[..., K]` to `[..., N]`, in its dtype."""
        return multiply(self, input)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight `[N, K]` in the dtype it had."""
        return self.dequantize(self.compute_dtype)


class QuantizedConv1D(QuantizedModule):
    """As transformers' Conv1D, a linear layer that keeps its weight transposed."""

    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` to `[..., N]`, in its dtype."""
        return multiply(self, x)

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[K, N]` in the dtype it had."""
        return self.dequantize(self.compute_dtype).t()


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """As nn.Embedding; subclasses that scale the result keep doing so."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids `[...] int64` to `[..., K]` in the dtype that the weight had."""
        rows = input.reshape(-1)
        return self._look_up(rows).view(*input.shape, self.embedding_dim)

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        if self.packed_weight is not None:
            return dequantize_packed(self.packed_weight, rows, self.compute_dtype)
        return self.quantized_weight.select(rows).dequantize(self.compute_dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight `[N, K]` in the dtype it had."""
        return self.dequantize(self.compute_dtype)


def multiply(module: QuantizedModule, x: torch.Tensor) -> torch.Tensor:
    """x `[..., K]` times the module's weight transposed, plus its bias."""
    bias = cast("torch.Tensor | None", module.bias)
    packed, kernels = module.packed_weight, module.native_kernels
    if module.scheme.dynamic:
        return _multiply_fp8(module, x, bias)
    if isinstance(packed, TritonWeight):
        return _multiply_by_triton(module, x, packed, bias)
    plain = not torch.is_grad_enabled() and (bias is None or bias.dtype is x.dtype)
    if packed is not None and kernels is not None and plain and x.is_cpu and x.dtype in DTYPES:
        return kernels.quantized_linear(module.arrange(x), packed, bias)
    return functional.linear(x, module.dequantize(x.dtype), bias)


def _multiply_fp8(module: QuantizedModule, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = module.quantized_weight
    scales = None
    if multiplies_fp8(x.device):
        kept: tuple[torch.Tensor, torch.Tensor] | None = vars(module).get("kept_scales")
        if (
            kept is None or kept[0] is not weight.scales
        ):  # they would cost as much as a small product each time
            kept = weight.scales, output_scales(weight)
            vars(module)["kept_scales"] = kept
        scales = kept[1]
    return fp8_linear(module.arrange(x), weight, bias, scales, deterministic=module.deterministic)


def _multiply_by_triton(
    module: QuantizedModule, x: torch.Tensor, packed: TritonWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The kernels record no gradient; where one is wanted, and off the weight's device, torch multiplies."""
    if torch.is_grad_enabled() or x.device != packed.codes.device:
        return functional.linear(x, module.dequantize(x.dtype), bias)
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    return quantized_linear(module.arrange(x), packed, bias)


def dequantize_packed(
    packed: PackedWeight | TritonWeight, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weight `[N, K]`, or its outputs `rows` `[T] int64`: `[T, K]`."""
    if isinstance(packed, TritonWeight):
        from memory_efficient_gpt.triton_kernels.linear import dequantize

        return dequantize(packed, dtype, rows)
    return dequantize_rows(packed, torch.arange(packed.num_outputs) if rows is None else rows, dtype)


def hold(module: nn.Module, kind: type[QuantizedModule], weight: QuantizedWeight) -> QuantizedModule:
    """Let `module` hold `weight` instead of its float one, as a module of `kind`. Changes it in place."""
    own = type(module)
    dtype = cast(torch.Tensor, module.weight).dtype
    del module.weight
    module.__class__ = _subclass(kind, own)  # type: ignore[arg-type]  # classes are hashable
    quantized = cast(QuantizedModule, module)
    quantized.scheme, quantized.num_inputs, quantized.compute_dtype = weight.scheme, weight.num_inputs, dtype
    quantized.packed_weight = quantized.native_kernels = None
    # transformers draws random weights for modules without this mark, and fills buffers such as a scale.
    quantized._is_hf_initialized = not module._buffers  # type: ignore[assignment]
    quantized.set_weight(weight)
    return quantized


def pack_weight(weight: QuantizedWeight, kernels: Kernels) -> PackedWeight:
    """The weight in the layout of the native kernels. Only for integer schemes on the CPU."""
    scheme = weight.scheme
    return pack_stored(
        kernels, weight.codes.contiguous(), weight.scales, weight.offsets, float(weight.unit),
        num_inputs=weight.num_inputs, bits=scheme.bits, group_size=scheme.group_size,
    )  # fmt: skip


@functools.cache
def _subclass(kind: type[QuantizedModule], own: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, own):
        return kind
    bases = (own, kind) if issubclass(own, nn.Embedding) else (kind, own)
    return type(f"Quantized{own.__name__}", bases, {"__module__": own.__module__})


def _stored_layout(scheme: Scheme, packed: PackedWeight | TritonWeight) -> QuantizedWeight:
    if isinstance(packed, TritonWeight):
        from memory_efficient_gpt.quantization.triton_weights import stored_layout

        return stored_layout(scheme, packed)
    codes, scales, offsets = unpack(packed)
    if scheme.granularity == "tensor":
        scales, offsets = scales[:1], offsets[:1] if offsets is not None else None
    codes = pack_nibbles(codes) if scheme.bits == 4 else codes
    return QuantizedWeight(scheme, packed.num_inputs, codes, scales, offsets, torch.tensor(packed.unit))
