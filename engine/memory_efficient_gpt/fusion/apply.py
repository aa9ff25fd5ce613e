"""Give a loaded model's layers the native CPU kernels, in place.

Purpose: recognise linear layers, RMS norms, gated MLPs and fused experts by their structure, check that a
kernel gives what the layer gives, and let it compute.
Does not know: architectures' names, attention, the engine.
Invariant: a layer whose native result differs from its own stays as it is, with a reason in the report.

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

from memory_efficient_gpt.fusion.structures import KINDS, PROBE_ERRORS, Kind, draw, dtype_of, own_parameter
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.layers import NativeConv1D, NativeExperts, become
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.rotary import (
    has_native_rotary,
    native_rotary,
    rotary_function,
    with_native_rotary,
)
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.model import give_kernels, give_stack_kernels, quantized_modules

logger = logging.getLogger(__name__)

# Largest difference from the layer's own result, relative to that result's largest element. float32: sums in
# another order. bfloat16: one rounding of 2^-8, or two layers' worth where an intermediate result is rounded.
TOLERANCES: Final = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


@dataclass(slots=True)
class FusionReport:
    """What `fuse` did. `replaced` counts modules by kind; `dropped` counts (kind, reason) of those kept."""

    isa: str | None = None
    unavailable: str | None = None
    replaced: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for a log or for GET /v1/models."""
        if self.unavailable is not None:
            return f"layers by torch: native kernels are unavailable: {self.unavailable}"
        done = ", ".join(f"{count} {kind}" for kind, count in sorted(self.replaced.items())) or "no layer"
        kept = "; ".join(f"{n} {kind}: {why}" for (kind, why), n in sorted(self.dropped.items()))
        return f"native kernels ({self.isa}): {done}" + (f"; kept torch for {kept}" if kept else "")


def fuse(model: nn.Module, kernels: Kernels | None = None) -> FusionReport:
    """Make recognised modules of `model` compute with native kernels; changes the model in place.

    kernels: None loads those for this CPU; where there are none, nothing changes and the report says why.
    One module of each kind (class, shapes, constants) is checked against its own forward on random input.
    What was fused before stays so.
    """
    loaded = load_kernels() if kernels is None else kernels
    if isinstance(loaded, Unavailable):
        report = FusionReport(unavailable=loaded.reason)
        logger.warning(report.summary())
        return report
    report = FusionReport(isa=loaded.isa)
    verdicts: dict[object, str | dict[str, Any]] = {}
    with torch.no_grad():
        _fuse_quantized(model, loaded, report)
        for module in model.modules():
            _fuse_module(module, loaded, report, verdicts)
            _fuse_rotary(module, loaded, report, verdicts)
        _report_slow_experts(model, report)
    logger.info(report.summary())
    return report


def _fuse_module(
    module: nn.Module, kernels: Kernels, report: FusionReport, verdicts: dict[object, str | dict[str, Any]]
) -> None:
    for kind in KINDS:
        if isinstance(module, kind.layer):  # it was fused before
            report.replaced[kind.name] += 1
            return
        shape = kind.recognise(module)
        if shape is None:
            continue
        if (reason := _obstacle(module)) is not None:
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
        if kind.layer is NativeExperts:
            give_stack_kernels(module, kernels)
        report.replaced[kind.name] += 1
        return


def _fuse_quantized(model: nn.Module, kernels: Kernels, report: FusionReport) -> None:
    """Quantized layers first: what is fused around them is then tried on what will really run."""
    for outcome, count in give_kernels(model, kernels).items():
        if outcome == "native":
            report.replaced["quantized"] += count
        else:
            report.dropped["quantized", outcome] += count


def _report_slow_experts(model: nn.Module, report: FusionReport) -> None:
    """Stacks that no kernel takes are dequantized expert by expert."""
    slow = [m for m in quantized_modules(model) if isinstance(m, QuantizedStack) and m.packed_weight is None]
    if slow:
        report.dropped["quantized", "experts without a kernel are dequantized one by one"] += len(slow)


def _fuse_rotary(
    module: nn.Module, kernels: Kernels, report: FusionReport, verdicts: dict[object, str | dict[str, Any]]
) -> None:
    """Turn an attention module's queries and keys with the kernel, if its model's function does the same."""
    if has_native_rotary(module):
        report.replaced["rotary"] += 1
        return
    own, dtype = rotary_function(type(module)), dtype_of(module)
    if own is None or dtype is None:
        return
    reason = _obstacle(module)
    if reason is None:
        key = ("rotary", own, dtype)
        if key not in verdicts:
            verdicts[key] = _judge_rotary(own, kernels, torch.empty(0, dtype=dtype))
        verdict = verdicts[key]
        reason = verdict if isinstance(verdict, str) else None
    if reason is not None:
        report.dropped["rotary", reason] += 1
        return
    fused = with_native_rotary(type(module), kernels)  # type: ignore[arg-type]  # classes are hashable
    module.__class__ = fused
    report.replaced["rotary"] += 1


def _judge_rotary(own: Callable[..., Any], kernels: Kernels, like: torch.Tensor) -> str | dict[str, Any]:
    """{} if the kernel turns queries and keys as the model's function does, or why it does not."""
    query, key = draw(1, 5, 4, 16, like=like).transpose(1, 2), draw(1, 5, 2, 16, like=like).transpose(1, 2)
    cos, sin = draw(1, 5, 16, like=like), draw(2, 5, 16, like=like)[1:]
    try:
        want = own(query, key, cos, sin)
        got = native_rotary(kernels, own)(query, key, cos, sin)
        worst = max(_relative(g, w) for g, w in zip(got, want, strict=True))
    except PROBE_ERRORS as error:
        return f"its function could not be tried ({type(error).__name__}: {error})"
    limit = TOLERANCES[like.dtype]
    return {} if worst <= limit else f"the native result differs by {worst:.2g} (limit {limit:.2g})"


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference by the largest element wanted; infinite for other shapes or dtypes."""
    if want.shape != got.shape or want.dtype is not got.dtype:
        return torch.inf
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-30))


def _obstacle(module: nn.Module) -> str | None:
    """Why no kernel can take a module of a known structure, before any number is computed."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for weight in module.parameters():
        if weight.dtype not in TOLERANCES:
            return f"no kernel for {weight.dtype}"
        if not weight.is_cpu:
            return f"on {weight.device.type}"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
    return None


def _judge(module: nn.Module, kind: Kind, kernels: Kernels) -> str | dict[str, Any]:
    """The settings with which the kernel gives what the module gives, or why there are none."""
    dtype = dtype_of(module)
    assert dtype is not None, "a recognised structure has weights"
    limit = TOLERANCES[dtype]
    tried: list[tuple[float, dict[str, Any]]] = []
    with _telling_weights(module):
        for settings in kind.candidates(module):
            try:
                tried.append((_difference(module, kind, kernels, settings), settings))
            except PROBE_ERRORS as error:
                return f"its forward could not be tried ({type(error).__name__}: {error})"
    if not tried:
        return "an activation without a kernel"
    least, settings = min(tried, key=lambda trial: trial[0])
    if not least <= limit:  # also when NaN
        return f"the native result differs by {least:.2g} (limit {limit:.2g})"
    return settings


def _difference(module: nn.Module, kind: Kind, kernels: Kernels, settings: dict[str, Any]) -> float:
    """Largest difference of native and own results, relative to the largest of the latter."""
    own = type(module)
    worst = 0.0
    for inputs in kind.inputs(module):
        want = module(*inputs)
        try:
            become(module, kind.layer, kernels, settings)
            got = module(*inputs)
        finally:
            module.__class__ = own
        worst = max(worst, _relative(got, want))
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
