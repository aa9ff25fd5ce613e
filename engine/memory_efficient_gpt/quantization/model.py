"""Quantize a loaded model in place, layer by layer.

Purpose: put quantized weights where float ones were, as a plan says, and report what became of every byte.
Does not know: files, the engine, how a plan was made.
Invariant: a float weight is dropped before the next one is quantized; what stays float is listed with its
bytes. A device that the model is brought to while it is quantized never has all its float weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.device_reads import bring
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.native.packed_weight import PackedWeight
from memory_efficient_gpt.quantization.bitsandbytes import hold_bitsandbytes
from memory_efficient_gpt.quantization.bitsandbytes_linear import BitsAndBytesModule, bitsandbytes_modules
from memory_efficient_gpt.quantization.experts import QuantizedStack, hold_stack, stacked_parameters
from memory_efficient_gpt.quantization.input_products import InputProducts
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.modules import QuantizedModule, hold, pack_weight
from memory_efficient_gpt.quantization.naming import inner_schemes
from memory_efficient_gpt.quantization.plans import Plan
from memory_efficient_gpt.quantization.rounding import Rounding, quantize_weight, rounding_of
from memory_efficient_gpt.quantization.scheme import Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight
from memory_efficient_gpt.quantization.without_parameters import describe_itself

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_WHOLE_STACK_CALLS: Final = frozenset({"bmm", "einsum", "matmul", "grouped_mm"})
_NO_CODE: Final = (lambda: None).__code__
KERNEL_TOLERANCE: Final = 0.03
_NO_INPUTS: Final = {"experts": "stacked experts", "embedding": "an embedding multiplies nothing"}
_UNREACHED: Final = "no token of the text reached it"

Progress = Callable[[str, float], None]


@dataclass(slots=True)
class QuantizationReport:
    """What quantizing did. Bytes are of whole models: weights, embeddings, norms and all.

    rounded: layers by how; searched: those for which "gptq" was asked and that were not, by why.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    schemes: dict[str, Scheme] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    rounded: Counter[str] = field(default_factory=Counter)
    searched: Counter[str] = field(default_factory=Counter)

    @property
    def saved(self) -> float:
        """The share of bytes that is gone."""
        return 1.0 - self.bytes_after / self.bytes_before if self.bytes_before else 0.0

    def summary(self) -> str:
        """One line for a log or for GET /v1/models."""
        counts: dict[str, int] = {}
        for scheme in self.schemes.values():
            counts[str(scheme)] = counts.get(str(scheme), 0) + 1
        done = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "nothing"
        searched = "".join(f"; {count} not by gptq: {why}" for why, count in self.searched.items())
        return (
            f"quantized {done}: {self.bytes_before / 1e6:,.1f} MB became {self.bytes_after / 1e6:,.1f} MB "
            f"({self.saved:.0%} saved){searched}"
        )


def quantize_model(
    model: PreTrainedModel,
    plan: Plan,
    *,
    rounding: Rounding = "search",
    importances: Mapping[str, torch.Tensor] | None = None,
    text: torch.Tensor | None = None,
    kernels: Kernels | None = None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> QuantizationReport:
    """Quantize the weights that `plan` names; changes the model in place.

    device: where the model is to be; None leaves it where it is. Weights are brought there one by one, so
    that it needs room for the quantized ones and a few others, never for all float ones.
    importances: mean squares `[K]` of each layer's inputs by name; absent ones count all inputs alike.
    text: tokens `[B, T] int64` on which the model runs for "gptq"; it does so where it is.
    kernels: search natively where weights are on the CPU; None searches in torch.
    rounding "hqq" holds for schemes with zero points, "gptq" for integers; others are searched.
    Raises UnsupportedModelError for experts that the model's code does not index one by one, ValueError for
    gptq without a text or for a model that is elsewhere.
    """
    report = QuantizationReport(bytes_before=weight_bytes(model))
    layers = [layer for layer in find_layers(model) if layer.name in plan and plan[layer.name].kind != "none"]
    if any(layer.role == "experts" for layer in layers):
        index_experts_one_by_one(model)
    products = _products(model, layers, plan, text, device, progress) if rounding == "gptq" else None
    weights = _brought(layers, device or model.device)
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(layer.name, number / len(layers))
        weight = next(weights)
        scheme = report.schemes[layer.name] = plan[layer.name]
        if scheme.by_bitsandbytes:
            hold_bitsandbytes(model, layer, scheme, weight)
            del weight
            continue
        how = rounding_of(scheme, rounding)
        own = products.of(layer) if products is not None and how == "gptq" else None
        if how == "gptq" and own is None:
            how = "search"
            report.searched[_NO_INPUTS.get(layer.role, _UNREACHED)] += 1
        elif rounding == "gptq" and how != "gptq":
            report.searched[f"{scheme} has no integers"] += 1
        report.rounded["nearest" if scheme.kind == "fp8" else how] += 1
        quantized = quantize_weight(
            weight, scheme, rounding=how, importance=(importances or {}).get(layer.name), products=own,
            kernels=kernels,
        )  # fmt: skip
        put_weight(layer, quantized)
        del weight, quantized, own
    if device is not None:
        nn.Module.to(model, device)  # transformers' own refuses models that are quantized
    describe_itself(model)
    report.bytes_after = weight_bytes(model)
    report.kept = _float_bytes(model)
    logger.info(report.summary())
    return report


def _products(
    model: PreTrainedModel, layers: Sequence[Layer], plan: Plan, text: torch.Tensor | None,
    device: torch.device | None, progress: Progress | None,
) -> InputProducts:  # fmt: skip
    if text is None:
        raise ValueError("gptq needs a text")
    if device is not None and device.type != model.device.type:
        raise ValueError(f"gptq runs the model, which is on {model.device}, not {device}")
    asked = [layer for layer in layers if plan[layer.name].kind == "int"]
    return InputProducts(model, asked, text, progress=progress)


def _brought(layers: Sequence[Layer], device: torch.device) -> Iterator[torch.Tensor]:
    """The float weight of each, on `device`; while one is quantized the next ones are copied there."""
    if all(layer.weight().device.type == device.type for layer in layers):
        return (layer.weight() for layer in layers)
    return bring([layer.weight for layer in layers], device)


def put_weight(layer: Layer, weight: QuantizedWeight) -> None:
    """Let every module of `layer` hold `weight`; the tensors are shared, not copied."""
    if layer.parameter is not None:
        hold_stack(layer.holders[0][0], layer.parameter, weight)
        return
    for module, kind in layer.holders:
        hold(module, kind, weight)


def give_kernels(model: nn.Module, kernels: Kernels) -> Counter[str]:
    """Let quantized modules compute with native kernels where there is one for their scheme.

    Counts what became of them: "native", or the reason why a module stays with torch. A weight shared by two
    modules is packed once; one module of each scheme and shape is checked against its dequantized weight.
    Stacks of experts are left to `give_stack_kernels`.
    """
    outcome: Counter[str] = Counter()
    packed: dict[int, tuple[QuantizedWeight, PackedWeight]] = {}
    checked: dict[tuple[Scheme, int, int], str | None] = {}
    for module in quantized_modules(model):
        if isinstance(module, QuantizedStack):
            continue
        if module.packed_weight is not None:
            outcome["native"] += 1
            continue
        weight = module.quantized_weight
        reason = _no_kernel(weight)
        if reason is None:
            key = weight.codes.data_ptr()
            if key not in packed:  # the weight is kept, so that no other one gets its address
                packed[key] = weight, pack_weight(weight, kernels)
            case = (weight.scheme, *weight.codes.shape)
            if case not in checked:
                checked[case] = _difference(kernels, *packed[key])
            reason = checked[case]
        if reason is None:
            module.use_kernels(kernels, packed[key][1])
        outcome[reason or "native"] += 1
    return outcome


def _no_kernel(weight: QuantizedWeight) -> str | None:
    if weight.scheme.kind != "int":
        return f"no native kernel for {weight.scheme}"
    if weight.codes.device.type != "cpu":
        return f"on {weight.codes.device.type}"
    return None


def give_stack_kernels(experts: nn.Module, kernels: Kernels) -> None:
    """Pack the stacks of an experts module that multiplies with native kernels."""
    for stack in quantized_modules(experts):
        if isinstance(stack, QuantizedStack) and stack.can_be_packed and stack.packed_weight is None:
            stack.use_kernels(kernels, pack_weight(stack.quantized_weight, kernels))


def _difference(kernels: Kernels, weight: QuantizedWeight, packed: PackedWeight) -> str | None:
    """Why the kernel must not be used for such weights: None if its result is right.

    It rounds activations to 8 bits: an error of 1% of the result's norm for Gaussian ones.
    """
    ends = torch.arange(min(64, weight.num_outputs))
    some = torch.cat((ends, weight.num_outputs - 1 - ends))
    x = torch.randn(3, weight.num_inputs, generator=torch.Generator().manual_seed(0))
    want = x @ weight.select(some).dequantize().t()
    got = kernels.quantized_linear(x, packed)[:, some]
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return None if error <= KERNEL_TOLERANCE else f"the native result differs by {error:.2g}"


def quantized_modules(model: nn.Module) -> list[QuantizedModule]:
    """Every module that holds a quantized weight."""
    return [module for module in model.modules() if isinstance(module, QuantizedModule)]


def report_of(model: nn.Module) -> QuantizationReport:
    """The report of a model that is as it is: float, or loaded quantized.

    Its bytes before are what all weights would take in the dtype that they compute in.
    """
    report = QuantizationReport(bytes_after=weight_bytes(model))
    report.bytes_before = report.bytes_after
    owners: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule) or _address(module) in owners:
            continue
        owners.add(_address(module))
        size = module.num_outputs * module.num_inputs * module.compute_dtype.itemsize
        report.bytes_before += size - module.weight_bytes
        report.schemes[name] = module.scheme
    for name, layer in model.named_modules():
        if isinstance(layer, BitsAndBytesModule):
            size = layer.num_outputs * layer.num_inputs * layer.compute_dtype.itemsize
            report.bytes_before += size - layer.weight_bytes
            report.schemes[name] = layer.scheme
    report.kept = _float_bytes(model)
    return report


def _float_bytes(model: nn.Module) -> dict[str, int]:
    """What is not quantized, by name; codes that bitsandbytes keeps in parameters are integers."""
    floats = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return {name: p.numel() * p.element_size() for name, p in floats}


def present_schemes(model: nn.Module) -> frozenset[Scheme]:
    """All schemes of quantized weights; none if nothing is quantized.

    Embedding and head count only where nothing else is quantized: a small model may be mostly these.
    """
    return inner_schemes(*_sizes(model))


def _sizes(model: nn.Module) -> tuple[Counter[Scheme], Counter[Scheme]]:
    """Weights by scheme: without embedding and head, and in all."""
    inner, total = Counter[Scheme](), Counter[Scheme]()
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    ends = [getter() for getter in getters if getter is not None]
    modules: list[QuantizedModule | BitsAndBytesModule] = [*quantized_modules(model)]
    for module in (*modules, *bitsandbytes_modules(model)):
        size = module.num_outputs * module.num_inputs * (module.scheme.kind != "none")
        total[module.scheme] += size
        inner[module.scheme] += size * all(module is not end for end in ends)
    return inner, total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights in memory, shared ones counted once."""
    sizes: dict[int, int] = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    for module in quantized_modules(model):
        sizes[_address(module)] = module.weight_bytes
    for layer in bitsandbytes_modules(model):
        sizes[cast(torch.Tensor, layer.weight).data_ptr()] = layer.weight_bytes
    return sum(sizes.values())


def _address(module: QuantizedModule) -> int:
    """Of the codes: the same for modules that share a weight."""
    packed = module.packed_weight
    return (packed.codes if packed is not None else module.quantized_weight.codes).data_ptr()


def index_experts_one_by_one(model: PreTrainedModel) -> None:
    """Switch off implementations that multiply with all experts at once."""
    setter = cast("Callable[[str], None] | None", getattr(model, "set_experts_implementation", None))
    if setter is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has stacked expert weights, and this transformers cannot run experts "
            "one by one. Update transformers, or load the model without quantization."
        )
    for module in model.modules():
        whole = _WHOLE_STACK_CALLS.intersection(getattr(type(module).forward, "__code__", _NO_CODE).co_names)
        if stacked_parameters(module) and whole:
            raise UnsupportedModelError(
                f"{type(module).__name__} multiplies with all its experts' weights at once "
                f"({', '.join(sorted(whole))}); quantized ones are taken one by one. "
                "Load the model without quantization."
            )
    setter("eager")
