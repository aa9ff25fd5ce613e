"""Give a loaded model's layers kernels of ours, in place: native C++ on the CPU, Triton on CUDA.

Purpose: recognise linear layers, RMS norms, gated MLPs and stacked experts by their structure, check that a
kernel gives what the layer gives, and let it compute.
Does not know: architectures' names, attention, the engine.
Invariant: a layer whose result by a kernel differs from its own stays as it is, with a reason in the report.

A fused module keeps its identity, parameters, hooks and state_dict: only its class changes, to a subclass
whose `forward` calls the kernel. With gradients enabled, on another device or in another dtype, the subclass
computes with the original `forward`, so the model stays usable by plain transformers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.fusion.grouped_experts import GROUPED_EXPERTS, GroupedExperts
from memory_efficient_gpt.fusion.kernels import kernels_for
from memory_efficient_gpt.fusion.structures import KINDS, Kind, device_of, draw, dtype_of, own_parameter
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.layers import (
    LayerKernels,
    NativeConv1D,
    NativeExperts,
    NativeLayer,
    NativeLinear,
    become,
)
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.native.rotary import (
    native_rotary,
    rotary_function,
    rotary_kernels,
    with_native_rotary,
)
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.model import give_kernels, give_stack_kernels
from memory_efficient_gpt.quantization.triton_weights import give_triton_kernels

logger = logging.getLogger(__name__)

# Largest difference from the layer's own result, relative to that result's largest element. float32: sums in
# another order. bfloat16: one rounding of 2^-8, or two layers' worth where an intermediate result is rounded;
# float16 likewise.
TOLERANCES: Final = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

_KINDS: Final = (*KINDS, GROUPED_EXPERTS)
Verdicts = dict[object, str | dict[str, Any]]
"""By kind of module: settings for its kernel, or why it gets none."""


@dataclass(slots=True)
class FusionReport:
    """What `fuse` did. `replaced` counts modules by kind; `dropped` counts (kind, reason) of those kept.

    label: the kernels'.
    """

    label: str
    unavailable: str | None = None
    replaced: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for a log or for GET /v1/models."""
        if self.unavailable is not None:
            return f"layers by torch: {self.label} are unavailable: {self.unavailable}"
        done = ", ".join(f"{count} {kind}" for kind, count in sorted(self.replaced.items())) or "no layer"
        kept = "; ".join(f"{n} {kind}: {why}" for (kind, why), n in sorted(self.dropped.items()))
        return f"{self.label}: {done}" + (f"; kept torch for {kept}" if kept else "")


def fuse(model: nn.Module, kernels: LayerKernels | None = None) -> FusionReport:
    """Make recognised modules of `model` compute with kernels; changes the model in place.

    kernels: None takes those for the model's device; where there are none, nothing changes and the report
    says why. One module of each kind (class, shapes, constants) is checked against its own forward on random
    input. What was fused before stays so, unless it was for another device.
    """
    loaded = kernels_for(model) if kernels is None else kernels
    if isinstance(loaded, Unavailable):
        label = "native kernels" if device_of(model).type == "cpu" else "Triton kernels"
        report = FusionReport(label, unavailable=loaded.reason)
        logger.warning(report.summary())
        return report
    report = FusionReport(loaded.label)
    verdicts: Verdicts = {}
    with torch.no_grad():
        _fuse_quantized(model, loaded, report)
        for module in model.modules():
            _give_up_others(module, loaded)
            _fuse_module(module, loaded, report, verdicts)
            _fuse_rotary(module, loaded, report, verdicts)
        _report_slow_experts(model, report)
    logger.info(report.summary())
    return report


def _give_up_others(module: nn.Module, kernels: LayerKernels) -> None:
    """Back to the module's own class where it was fused for another device or promise."""
    held = module.native_kernels if isinstance(module, NativeLayer) else rotary_kernels(module)
    if held is not None and (held.device_type, held.deterministic) != (
        kernels.device_type,
        kernels.deterministic,
    ):
        module.__class__ = type(module).__bases__[-1]


def _fuse_module(
    module: nn.Module,
    kernels: LayerKernels,
    report: FusionReport,
    verdicts: dict[object, str | dict[str, Any]],
) -> None:
    for kind in _KINDS:
        if not _has_kernel(kernels, kind):
            continue
        if isinstance(module, kind.layer):  # it was fused before
            report.replaced[kind.name] += 1
            return
        shape = kind.recognise(module)
        if shape is None:
            continue
        if kind.layer is NativeLinear and not kernels.multiplies(cast(torch.Tensor, module.weight)):
            return
        if (reason := _obstacle(module, kernels)) is not None:
            report.dropped[kind.name, reason] += 1
            return
        key = (kind.name, type(module), shape)
        if key not in verdicts:
            verdicts[key] = _judge(module, kind, kernels)
        verdict = verdicts[key]
        if isinstance(verdict, str):
            report.dropped[kind.name, verdict] += 1
            return
        if kind.layer is NativeConv1D:
            weight = cast(torch.Tensor, module.weight)
            weight.data = weight.data.t().contiguous().t()
        become(module, kind.layer, kernels, verdict)
        if kind.layer is NativeExperts and isinstance(kernels, Kernels):
            give_stack_kernels(module, kernels)
        report.replaced[kind.name] += 1
        return


def _has_kernel(kernels: LayerKernels, kind: Kind) -> bool:
    if kind.cpu_only:
        return isinstance(kernels, Kernels)
    return not kind.cuda_only or kernels.device_type == "cuda"


def _fuse_quantized(model: nn.Module, kernels: LayerKernels, report: FusionReport) -> None:
    """Quantized layers first: what is fused around them is then tried on what will really run."""
    if isinstance(kernels, Kernels):
        outcomes, taken = give_kernels(model, kernels), "native"
    else:
        outcomes, taken = give_triton_kernels(model, deterministic=kernels.deterministic), "triton"
    for outcome, count in outcomes.items():
        if outcome == taken:
            report.replaced["quantized"] += count
        else:
            report.dropped["quantized", outcome] += count


def _report_slow_experts(model: nn.Module, report: FusionReport) -> None:
    """Stacks that no kernel takes are dequantized expert by expert."""
    slow = 0
    for module in model.modules():
        stacks = [m for m in module.children() if isinstance(m, QuantizedStack)]
        if not isinstance(module, GroupedExperts):  # whose stacks are packed before it is recognised
            packed = isinstance(module, NativeExperts)
            slow += sum(not packed or stack.packed_weight is None for stack in stacks)
    if slow:
        report.dropped["quantized", "experts without a kernel are dequantized one by one"] += slow


def _fuse_rotary(
    module: nn.Module,
    kernels: LayerKernels,
    report: FusionReport,
    verdicts: dict[object, str | dict[str, Any]],
) -> None:
    """Turn an attention module's queries and keys with the kernel, if its model's function does the same."""
    if rotary_kernels(module) is not None:
        report.replaced["rotary"] += 1
        return
    own, dtype = rotary_function(type(module)), dtype_of(module)
    if own is None or dtype is None:
        return
    verdict: str | dict[str, Any] | None = _obstacle(module, kernels)
    if verdict is None:
        key = ("rotary", own, dtype)
        if key not in verdicts:
            like = torch.empty(0, dtype=dtype, device=device_of(module))
            verdicts[key] = _judge_rotary(own, kernels, like)
        verdict = verdicts[key]
    if isinstance(verdict, str):
        report.dropped["rotary", verdict] += 1
        return
    fused = with_native_rotary(type(module), kernels, **verdict)  # type: ignore[arg-type]  # classes are hashable
    module.__class__ = fused
    report.replaced["rotary"] += 1


def _judge_rotary(own: Callable[..., Any], kernels: LayerKernels, like: torch.Tensor) -> str | dict[str, Any]:
    """`with_native_rotary`'s options if the kernel turns as the model's function does, or why it does not."""
    limit = TOLERANCES[like.dtype]
    whole, part = _rotary_inputs(like, 16), _rotary_inputs(like, 12)
    try:
        worst = _rotary_difference(own, kernels, whole)
        partial = _takes(own, part) and _rotary_difference(own, kernels, part) <= limit
    except Exception as error:  # noqa: BLE001  # Triton's compiler has errors of its own
        return f"its function could not be tried ({_said(error)})"
    if not worst <= limit:
        return f"the kernel's result differs by {worst:.2g} (limit {limit:.2g})"
    return {"partial": partial}


def _rotary_inputs(like: torch.Tensor, turned: int) -> tuple[torch.Tensor, ...]:
    """Queries and keys with heads of 16 elements; cosines and sines of the first `turned` of them."""
    query, key = draw(1, 5, 4, 16, like=like).transpose(1, 2), draw(1, 5, 2, 16, like=like).transpose(1, 2)
    return query, key, draw(1, 5, turned, like=like), draw(2, 5, turned, like=like)[1:]


def _takes(own: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether a model's own function does not refuse `inputs`: many are for whole heads only."""
    try:
        own(*inputs)
    except Exception:  # noqa: BLE001  # models refuse in their own ways, most by adding unlike shapes
        return False
    return True


def _rotary_difference(
    own: Callable[..., Any], kernels: LayerKernels, inputs: tuple[torch.Tensor, ...]
) -> float:
    want = own(*inputs)
    got = native_rotary(kernels, own, partial=True)(*inputs)
    return max(relative_difference(g, w) for g, w in zip(got, want, strict=True))


def relative_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference by the largest element wanted; infinite for other shapes or dtypes."""
    if want.shape != got.shape or want.dtype is not got.dtype:
        return torch.inf
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-30))


def _obstacle(module: nn.Module, kernels: LayerKernels) -> str | None:
    """Why no kernel can take a module of a known structure, before any number is computed."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for weight in module.parameters():
        if weight.dtype not in kernels.dtypes:
            return f"no kernel for {weight.dtype}"
        if weight.device.type != kernels.device_type:
            return f"on {weight.device.type}"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
    return None


def _judge(module: nn.Module, kind: Kind, kernels: LayerKernels) -> str | dict[str, Any]:
    """The settings with which the kernel gives what the module gives, or why there are none."""
    dtype = dtype_of(module)
    assert dtype is not None, "a recognised structure has weights"
    limit = TOLERANCES[dtype]
    tried: list[tuple[float, dict[str, Any]]] = []
    with _telling_weights(module):
        for settings in kind.candidates(module):
            try:
                tried.append((_difference(module, kind, kernels, settings), settings))
            except Exception as error:  # noqa: BLE001  # Triton's compiler has errors of its own
                return f"its forward could not be tried ({_said(error)})"
    if not tried:
        return "an activation without a kernel"
    least, settings = min(tried, key=lambda trial: trial[0])
    if not least <= limit:  # also when NaN
        return f"the kernel's result differs by {least:.2g} (limit {limit:.2g})"
    return settings


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _difference(module: nn.Module, kind: Kind, kernels: LayerKernels, settings: dict[str, Any]) -> float:
    """Largest difference of the kernel's and own results, relative to the largest of the latter."""
    own = type(module)
    worst = 0.0
    for inputs in kind.inputs(module):
        want = module(*inputs)
        try:
            become(module, kind.layer, kernels, settings)
            got = module(*inputs)
        finally:
            module.__class__ = own
        worst = max(worst, relative_difference(got, want))
    return worst


@contextmanager
def _telling_weights(module: nn.Module) -> Iterator[None]:
    """Random numbers in place of a norm's weight: all ones would not tell one style from another."""
    weight = own_parameter(module, "weight")
    if weight is None or weight.dim() != 1:
        yield
        return
    kept = weight.data
    weight.data = draw(*kept.shape, like=kept)
    try:
        yield
    finally:
        weight.data = kept
