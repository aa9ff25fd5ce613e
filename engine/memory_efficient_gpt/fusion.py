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

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.layers import (
    NativeConv1D,
    NativeExperts,
    NativeGatedMLP,
    NativeLayer,
    NativeLinear,
    NativeRMSNorm,
    become,
)
from memory_efficient_gpt.native.ops import Activation, Kernels, NormStyle, load_kernels
from memory_efficient_gpt.native.rotary import native_rotary, rotary_function, with_native_rotary
from memory_efficient_gpt.quantization.model import give_kernels
from memory_efficient_gpt.quantization.modules import QuantizedLinear, QuantizedModule

logger = logging.getLogger(__name__)

# Largest difference from the layer's own result, relative to that result's largest element. float32: sums in
# another order. bfloat16: one rounding of 2^-8, or two layers' worth where an intermediate result is rounded.
TOLERANCES: Final = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
_EPSILON_NAMES: Final = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_ACTIVATION_NAMES: Final = ("act_fn", "activation_fn")
_NORM_STYLES: Final[tuple[NormStyle, ...]] = ("round_then_scale", "one_plus_weight", "scale_then_round")
_PROBE_ERRORS: Final = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)


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
    logger.info(report.summary())
    return report


@dataclass(frozen=True, slots=True)
class _Kind:
    """A structure that kernels know.

    recognise: a module's shapes and constants, or None for another structure; candidates: settings of the
    kernel that might fit; inputs: what to try them on.
    """

    name: str
    layer: type[NativeLayer]
    recognise: Callable[[nn.Module], object | None]
    candidates: Callable[[nn.Module], Iterable[dict[str, Any]]]
    inputs: Callable[[nn.Module], Iterable[tuple[torch.Tensor, ...]]]


def _fuse_module(
    module: nn.Module, kernels: Kernels, report: FusionReport, verdicts: dict[object, str | dict[str, Any]]
) -> None:
    for kind in _KINDS:
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
        report.replaced[kind.name] += 1
        return


def _fuse_quantized(model: nn.Module, kernels: Kernels, report: FusionReport) -> None:
    """Quantized layers first: what is fused around them is then tried on what will really run."""
    for outcome, count in give_kernels(model, kernels).items():
        if outcome == "native":
            report.replaced["quantized"] += count
        else:
            report.dropped["quantized", outcome] += count


def _fuse_rotary(
    module: nn.Module, kernels: Kernels, report: FusionReport, verdicts: dict[object, str | dict[str, Any]]
) -> None:
    """Turn an attention module's queries and keys with the kernel, if its model's function does the same."""
    own = rotary_function(type(module))
    weight = next(module.parameters(), None)
    if own is None or weight is None:
        return
    reason = _obstacle(module)
    if reason is None:
        key = ("rotary", own, weight.dtype)
        if key not in verdicts:
            verdicts[key] = _judge_rotary(own, kernels, weight)
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
    query, key = _draw(1, 5, 4, 16, like=like).transpose(1, 2), _draw(1, 5, 2, 16, like=like).transpose(1, 2)
    cos, sin = _draw(1, 5, 16, like=like), _draw(2, 5, 16, like=like)[1:]
    try:
        want = own(query, key, cos, sin)
        got = native_rotary(kernels, own)(query, key, cos, sin)
        worst = max(_relative(g, w) for g, w in zip(got, want, strict=True))
    except _PROBE_ERRORS as error:
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


def _judge(module: nn.Module, kind: _Kind, kernels: Kernels) -> str | dict[str, Any]:
    """The settings with which the kernel gives what the module gives, or why there are none."""
    limit = TOLERANCES[_dtype_of(module)]
    tried: list[tuple[float, dict[str, Any]]] = []
    with _telling_weights(module):
        for settings in kind.candidates(module):
            try:
                tried.append((_difference(module, kind, kernels, settings), settings))
            except _PROBE_ERRORS as error:
                return f"its forward could not be tried ({type(error).__name__}: {error})"
    if not tried:
        return "an activation without a kernel"
    least, settings = min(tried, key=lambda trial: trial[0])
    if not least <= limit:  # also when NaN
        return f"the native result differs by {least:.2g} (limit {limit:.2g})"
    return settings


def _difference(module: nn.Module, kind: _Kind, kernels: Kernels, settings: dict[str, Any]) -> float:
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
    weight = _own(module, "weight")
    if weight is None or weight.dim() != 1:
        yield
        return
    kept = weight.data
    weight.data = _draw(*kept.shape, like=kept)
    try:
        yield
    finally:
        weight.data = kept


def _is_linear(module: nn.Module) -> object | None:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return (*module.weight.shape, module.weight.dtype, module.bias is not None)


def _is_conv1d(module: nn.Module) -> object | None:
    weight, bias = _own(module, "weight"), _own(module, "bias")
    if weight is None or bias is None or weight.dim() != 2 or getattr(module, "nf", None) != weight.shape[1]:
        return None
    return (*weight.shape, weight.dtype) if bias.shape == weight.shape[1:] else None


def _is_rms_norm(module: nn.Module) -> object | None:
    weight = _own(module, "weight")
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
        (linear.out_features, linear.in_features, _dtype_of(linear), isinstance(linear, QuantizedLinear))
        for linear in linears
        if isinstance(linear, nn.Linear)
    ]
    return tuple(sizes) if len(sizes) == len(linears) else None


def _is_experts(module: nn.Module) -> object | None:
    merged, down = _own(module, "gate_up_proj"), _own(module, "down_proj")
    if merged is None or down is None or merged.dim() != 3 or down.dim() != 3:
        return None
    experts, hidden, inner = down.shape
    if len(list(module.parameters())) != 2 or merged.shape != (experts, 2 * inner, hidden):
        return None
    return (*down.shape, down.dtype) if merged.dtype is down.dtype else None


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Of the weights, or what a quantized layer's weights were."""
    first = next(module.parameters(), None)
    if first is not None:
        return first.dtype
    return next(m.compute_dtype for m in module.modules() if isinstance(m, QuantizedModule))


def _own(module: nn.Module, name: str) -> torch.Tensor | None:
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


def _activation_settings(module: nn.Module) -> Iterable[dict[str, Any]]:
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
    except _PROBE_ERRORS:
        return []
    return [{"activation": name} for name, y in known.items() if torch.allclose(own, y, rtol=0, atol=2e-6)]


def _draw(*shape: int, like: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * scale).to(like.dtype)


def _vectors(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    weight = cast(torch.Tensor, module.weight)
    size = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
    return [(_draw(1, 3, size, like=weight),)]


def _vectors_near_epsilon(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """Ordinary ones, and some so small that a wrong epsilon shows."""
    weight = cast(torch.Tensor, module.weight)
    return [(_draw(2, 3, weight.shape[0], like=weight, scale=scale),) for scale in (1.0, 1e-3)]


def _vectors_of_all_sizes(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """Large ones too, so that a clamp inside shows."""
    down, like = cast(nn.Linear, module.down_proj), torch.empty(0, dtype=_dtype_of(module))
    return [(_draw(1, 2, down.out_features, like=like, scale=scale),) for scale in (0.3, 30.0)]


def _routed_vectors(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    weight = cast(torch.Tensor, module.down_proj)
    experts, hidden, _ = weight.shape
    index = torch.stack([torch.arange(5) % experts, (torch.arange(5) * 3 + 1) % experts], dim=1)
    shares = torch.linspace(0.1, 0.9, 10).view(5, 2).to(weight.dtype)
    return [(_draw(5, hidden, like=weight, scale=scale), index, shares) for scale in (0.3, 30.0)]


_KINDS: Final = (
    _Kind("linear", NativeLinear, _is_linear, _plain, _vectors),
    _Kind("conv1d", NativeConv1D, _is_conv1d, _plain, _vectors),
    _Kind("rms_norm", NativeRMSNorm, _is_rms_norm, _norm_settings, _vectors_near_epsilon),
    _Kind("gated_mlp", NativeGatedMLP, _is_gated_mlp, _activation_settings, _vectors_of_all_sizes),
    _Kind("experts", NativeExperts, _is_experts, _activation_settings, _routed_vectors),
)
