"""The structures that kernels know, recognised without any architecture's name.

Purpose: what a linear layer, an RMS norm, a gated MLP or stacked experts look like; which settings of a
kernel might fit one; what to try them on.
Does not know: how a kernel is judged, what is done with the verdict (apply.py).
Invariant: a module that fits no structure whole fits none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.native.layers import (
    NativeConv1D,
    NativeExperts,
    NativeGatedMLP,
    NativeLayer,
    NativeLinear,
    NativeRMSNorm,
)
from memory_efficient_gpt.native.ops import Activation, NormStyle
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.modules import QuantizedLinear, QuantizedModule

_EPSILON_NAMES: Final = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_ACTIVATION_NAMES: Final = ("act_fn", "activation_fn")
_NORM_STYLES: Final[tuple[NormStyle, ...]] = ("round_then_scale", "one_plus_weight", "scale_then_round")
PROBE_ERRORS: Final = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True)
class Kind:
    """A structure that kernels know.

    recognise: a module's shapes and constants, or None for another structure; candidates: settings of the
    kernel that might fit; inputs: what to try them on. cpu_only: other devices have no such kernel;
    cuda_only: other devices have another one.
    """

    name: str
    layer: type[NativeLayer]
    recognise: Callable[[nn.Module], object | None]
    candidates: Callable[[nn.Module], Iterable[dict[str, Any]]]
    inputs: Callable[[nn.Module], Iterable[tuple[torch.Tensor, ...]]]
    cpu_only: bool = False
    cuda_only: bool = False


def _is_linear(module: nn.Module) -> object | None:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return (*module.weight.shape, module.weight.dtype, module.bias is not None)


def _is_conv1d(module: nn.Module) -> object | None:
    weight, bias = own_parameter(module, "weight"), own_parameter(module, "bias")
    if weight is None or bias is None or weight.dim() != 2 or getattr(module, "nf", None) != weight.shape[1]:
        return None
    return (*weight.shape, weight.dtype) if bias.shape == weight.shape[1:] else None


def _is_rms_norm(module: nn.Module) -> object | None:
    weight = own_parameter(module, "weight")
    if weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1 or list(module.children()):
        return None
    epsilons = _epsilons(module)
    return (*weight.shape, weight.dtype, *epsilons) if epsilons and _takes_one(module) else None


def _is_gated_mlp(module: nn.Module) -> object | None:
    names = {name for name, _ in module.named_children()} - set(_ACTIVATION_NAMES)
    if names not in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
        return None
    if list(module.parameters(recurse=False)) or not _takes_one(module):
        return None
    linears = [module.get_submodule(name) for name in sorted(names)]
    sizes = [
        (linear.out_features, linear.in_features, dtype_of(linear), isinstance(linear, QuantizedLinear))
        for linear in linears
        if isinstance(linear, nn.Linear)
    ]
    return tuple(sizes) if len(sizes) == len(linears) else None


def _is_experts(module: nn.Module) -> object | None:
    merged, down = (stack_of(module, name) for name in ("gate_up_proj", "down_proj"))
    if merged is None or down is None or len(merged.shape) != 3 or len(down.shape) != 3:
        return None
    experts, hidden, inner = down.shape
    others = {name for name, _ in module.named_parameters()} - {"gate_up_proj", "down_proj"}
    if others or merged.shape != (experts, 2 * inner, hidden) or merged.dtype is not down.dtype:
        return None
    return (*down.shape, down.dtype, type(merged) is type(down), isinstance(down, QuantizedStack))


def stack_of(module: nn.Module, name: str) -> torch.Tensor | QuantizedStack | None:
    """A stack of experts' weights, float or quantized."""
    held = module._modules.get(name)
    return held if isinstance(held, QuantizedStack) else own_parameter(module, name)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Of the module's weights, or what its quantized layers' weights were; None if it has none."""
    first = next(module.parameters(), None)
    if first is not None:
        return first.dtype
    return next((m.compute_dtype for m in module.modules() if isinstance(m, QuantizedModule)), None)


def device_of(module: nn.Module) -> torch.device:
    """Of the module's first weight, quantized ones included; the CPU if it has none."""
    for tensor in module.parameters():
        return tensor.device
    for part in module.modules():
        if isinstance(part, QuantizedModule):
            packed = part.packed_weight
            return (packed.codes if packed is not None else part.quantized_weight.codes).device
    return torch.device("cpu")


def own_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """The module's own parameter of that name, not a child's."""
    return module._parameters.get(name)


def _epsilons(module: nn.Module) -> list[float]:
    values = (getattr(module, name, None) for name in _EPSILON_NAMES)
    return [value for value in values if isinstance(value, float)]


def _takes_one(module: nn.Module) -> bool:
    """Whether forward takes one tensor and nothing else."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _plain(module: nn.Module) -> Iterable[dict[str, Any]]:
    return ({},)


def _norm_settings(module: nn.Module) -> Iterable[dict[str, Any]]:
    return [{"eps": eps, "style": style} for eps in _epsilons(module)[:1] for style in _NORM_STYLES]


def activation_settings(module: nn.Module) -> Iterable[dict[str, Any]]:
    """The kernel whose function the module's activation is, to float32's accuracy."""
    function = next((getattr(module, n) for n in _ACTIVATION_NAMES if hasattr(module, n)), None)
    if not callable(function):
        return []
    x = torch.linspace(-8, 8, 257)
    known: dict[Activation, torch.Tensor] = {
        "silu": nn.functional.silu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
        "gelu": nn.functional.gelu(x),
    }
    try:
        own = function(x)
    except PROBE_ERRORS:
        return []
    return [{"activation": name} for name, y in known.items() if torch.allclose(own, y, rtol=0, atol=2e-6)]


def draw(*shape: int, like: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Gaussian numbers in the dtype and on the device of `like`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * scale).to(device=like.device, dtype=like.dtype)


def _vectors(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    weight = cast(torch.Tensor, module.weight)
    size = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
    return [(draw(1, 3, size, like=weight),)]


def _one_vector_and_several(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """There may be a kernel for one row."""
    weight = cast(torch.Tensor, module.weight)
    return [(draw(1, rows, weight.shape[1], like=weight),) for rows in (1, 3)]


def _vectors_near_epsilon(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """Ordinary ones, and some so small that a wrong epsilon shows."""
    weight = cast(torch.Tensor, module.weight)
    return [(draw(2, 3, weight.shape[0], like=weight, scale=scale),) for scale in (1.0, 1e-3)]


def _vectors_of_all_sizes(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """Large ones too, so that a clamp inside shows."""
    down = cast(nn.Linear, module.down_proj)
    like = torch.empty(0, dtype=dtype_of(module), device=device_of(module))
    return [(draw(1, 2, down.out_features, like=like, scale=scale),) for scale in (0.3, 30.0)]


def _routed_vectors(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    weight = cast("torch.Tensor | QuantizedStack", module.down_proj)
    experts, hidden, _ = weight.shape
    like = torch.empty(0, dtype=weight.dtype)
    index = torch.stack([torch.arange(5) % experts, (torch.arange(5) * 3 + 1) % experts], dim=1)
    shares = torch.linspace(0.1, 0.9, 10).view(5, 2).to(weight.dtype)
    return [(draw(5, hidden, like=like, scale=scale), index, shares) for scale in (0.3, 30.0)]


KINDS: Final = (
    Kind("linear", NativeLinear, _is_linear, _plain, _one_vector_and_several),
    Kind("conv1d", NativeConv1D, _is_conv1d, _plain, _vectors, cpu_only=True),
    Kind("rms_norm", NativeRMSNorm, _is_rms_norm, _norm_settings, _vectors_near_epsilon),
    Kind("gated_mlp", NativeGatedMLP, _is_gated_mlp, activation_settings, _vectors_of_all_sizes),
    Kind("experts", NativeExperts, _is_experts, activation_settings, _routed_vectors, cpu_only=True),
)
