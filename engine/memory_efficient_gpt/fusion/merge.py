"""Find linear layers that get the same input, and let one product compute them.

Purpose: group layers by what a forward pass gives them, merge them, check numbers and model, undo what fails.
Does not know: architectures' names, how the model is run (the caller's `run`).
Invariant: layers whose parts differ from their own results, or with which the model does not run as before,
are as they were afterwards, with a reason in the report.

Two checks tell two kinds of mistakes apart. A group's parts are compared with its layers' own results on the
inputs that the forward pass had: sums in another order may round differently, no more. Then the model runs
with parts computed layer by layer, as before, but handed out as merged ones are: nothing may change at all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from memory_efficient_gpt.fusion.apply import TOLERANCES, relative_difference
from memory_efficient_gpt.fusion.merged_fp8 import Fp8Product, fp8_weight_of
from memory_efficient_gpt.fusion.merged_linear import DenseProduct, MergedLinear, Mode, Multiply, part_ways
from memory_efficient_gpt.fusion.merged_quantized import TritonProduct, packed_of, quantized_obstacle
from memory_efficient_gpt.fusion.structures import dtype_of, own_parameter
from memory_efficient_gpt.quantization.modules import QuantizedModule

logger = logging.getLogger(__name__)

_RELEASE_BYTES: Final = 256 << 20
"""Weights that were copied before CUDA's allocator is told to give the old ones' memory back: blocks of their
sizes fit no group."""
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ADAPTED: Final = "base_layer"
"""What peft's modules, and others after its example, call the layer that they wrap."""

Run = Callable[[], torch.Tensor]
"""A forward pass of the model over a few tokens; gives logits. The same at every call."""


@dataclass(slots=True)
class MergeReport:
    """What `merge_linears` did. `merged`: products by number of layers; `dropped`: layers by reason."""

    merged: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for a log or for GET /v1/models; empty if no layers share an input."""
        if not self.merged and not self.dropped:
            return ""
        layers = sum(size * count for size, count in self.merged.items())
        kept = "; ".join(f"{count} layers: {why}" for why, count in sorted(self.dropped.items()))
        done = f"{layers} linear layers merged into {self.merged.total()} products"
        return done + (f"; kept apart {kept}" if kept else "")


def merge_linears(
    model: nn.Module, run: Run, multiply: Multiply | None = None, *, deterministic: bool = False
) -> MergeReport:
    """Let one product compute linear layers of `model` that get the same input; changes the model in place.

    run: see `Run`; it is called at most three times. multiply: how weights that are tensors are multiplied,
    if not by torch; deterministic: whether a row's result of it never depends on the number of rows.
    Memory: one group's weights, twice, while it is merged;
    on CUDA the old ones of some groups more, until the allocator gives them back.
    Layers that have hooks or adapters, share a weight, or have a `forward` of their own are left alone, and
    quantized ones that are not on the Triton kernels.
    """
    report = MergeReport()
    serving = torch.inference_mode()(run)  # there, tensors have no version that tells a write in place
    _part_what_moved(model)
    products = {
        id(m.merged_product): m.merged_product for m in model.modules() if isinstance(m, MergedLinear)
    }
    report.merged.update(product.layers for product in products.values())  # merged before, and still so
    with torch.no_grad():
        try:
            groups = _groups(model, serving)
        except Exception as error:  # noqa: BLE001  # any model code may run here
            report.dropped[f"the forward pass to find them failed ({_said(error)})"] += 1
            logger.warning(report.summary())
            return report
        merged = list(_merged(groups, multiply, report, deterministic=deterministic))
        reason = _model_difference(serving, [layers for layers, _ in merged])
        for layers, size in merged:
            if reason is None:
                report.merged[size] += 1
            else:
                _part(layers, reason, report)
    logger.info(report.summary())
    return report


@dataclass(slots=True)
class _Calls:
    """What a forward pass gave a layer."""

    layer: nn.Linear
    inputs: list[torch.Tensor] = field(default_factory=list)


def _groups(model: nn.Module, run: Run) -> list[list[_Calls]]:
    """Layers of one parent that get the very same tensors, in the order of their first calls."""
    parents = _plain_siblings(model)
    called: dict[int, _Calls] = {}

    def record(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(layer, nn.Linear) and arguments:
            called.setdefault(id(layer), _Calls(layer)).inputs.append(arguments[0])

    handles = [layer.register_forward_pre_hook(record) for layer in parents]
    try:
        if handles:
            run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, ...], list[_Calls]] = {}
    for calls in called.values():
        key = (parents[calls.layer], *map(id, calls.inputs))  # the inputs are alive: ids are theirs
        groups.setdefault(key, []).append(calls)
    return [group for group in groups.values() if len(group) > 1]


def _plain_siblings(model: nn.Module) -> dict[nn.Linear, int]:
    """Layers that may be merged, and the parent of each: one that has several of them."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    quantized = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    owners.update(id(held) for m in quantized for held in (m.packed_weight, *m.buffers(recurse=False)))
    adapted = {id(m) for a in model.modules() if _ADAPTED in a._modules for m in a.modules()}
    siblings: dict[nn.Linear, int] = {}
    for parent in model.modules():
        plain = [m for m in parent.children() if isinstance(m, nn.Linear) and _is_plain(m, owners)]
        free = [m for m in plain if id(m) not in adapted]
        if len(free) > 1:
            siblings.update(dict.fromkeys(free, id(parent)))
    return siblings


def _is_plain(layer: nn.Linear, owners: Counter[int]) -> bool:
    """Whether the layer is its weight and bias and nothing else, and no other module has them."""
    if "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS):
        return False
    if isinstance(layer, QuantizedModule):
        packed = packed_of(layer)
        if packed is not None:
            return owners[id(packed)] == 1
        weight = fp8_weight_of(layer)
        return weight is not None and owners[id(weight.codes)] == 1
    if type(layer).forward is not nn.Linear.forward:
        return False
    tensors = list(layer.parameters())
    own = all(type(t) is nn.Parameter and t.is_contiguous() and owners[id(t)] == 1 for t in tensors)
    return own and len(tensors) == (1 if own_parameter(layer, "bias") is None else 2)


def _merged(
    groups: list[list[_Calls]], multiply: Multiply | None, report: MergeReport, *, deterministic: bool
) -> Iterator[tuple[list[MergedLinear], int]]:
    """Merge group by group; gives the layers of those whose numbers are right, with their count."""
    copied = 0
    for group in groups:
        layers = [calls.layer for calls in group]
        reason = _obstacle(layers)
        if reason is not None:
            report.dropped[reason] += len(layers)
            continue
        inputs = group[0].inputs
        want = [[layer(x) for x in inputs] for layer in layers]
        copied += sum(map(_weight_bytes, layers))
        _join(layers, multiply, deterministic=deterministic)
        merged: list[MergedLinear] = [layer for layer in layers if isinstance(layer, MergedLinear)]
        reason = _difference(inputs, merged, want)
        if reason is None:
            yield merged, len(merged)
        else:
            _part(merged, reason, report)
        if inputs[0].is_cuda and copied >= _RELEASE_BYTES:
            torch.cuda.empty_cache()
            copied = 0


def _join(layers: list[nn.Linear], multiply: Multiply | None, *, deterministic: bool) -> None:
    """Let the layers, which `_obstacle` lets pass, share a product."""
    if packed_of(layers[0]) is not None:
        TritonProduct(layers)
    elif fp8_weight_of(layers[0]) is not None:
        Fp8Product(layers)
    else:
        DenseProduct(layers, multiply, deterministic=deterministic)


def _obstacle(layers: list[nn.Linear]) -> str | None:
    """Why these can't be one product."""
    if len({own_parameter(layer, "bias") is None for layer in layers}) > 1:
        return "some have biases, others none"
    weights = [packed_of(layer) for layer in layers]
    if any(weight is not None for weight in weights):
        packed = [weight for weight in weights if weight is not None]
        return quantized_obstacle(packed) if len(packed) == len(layers) else "some are quantized, others not"
    eights = [weight for layer in layers if (weight := fp8_weight_of(layer)) is not None]
    if eights:
        alike = len(eights) == len(layers) and len({(w.num_inputs, w.codes.device) for w in eights}) == 1
        return None if alike else "quantized differently"
    if len({(t.dtype, t.device) for layer in layers for t in layer.parameters()}) > 1:
        return "of different dtypes or devices"
    dtype = layers[0].weight.dtype
    return None if dtype in TOLERANCES else f"their dtype is {dtype}"


def _difference(
    inputs: list[torch.Tensor], layers: list[MergedLinear], want: list[list[torch.Tensor]]
) -> str | None:
    """Why the layers' parts are not their results; None if they are."""
    worst = 0.0
    for number, x in enumerate(inputs):
        for layer, own in zip(layers, want, strict=True):
            worst = max(worst, relative_difference(layer(x), own[number]))
    limit = _tolerance(layers[0])
    return None if worst <= limit else f"one product's result differs by {worst:.2g} (limit {limit:.2g})"


def _model_difference(run: Run, groups: list[list[MergedLinear]]) -> str | None:
    """Why the model does not take merged parts; None if it computes what it did."""
    if not groups:
        return None
    with _mode(groups, "off"):
        want = run()
    try:
        with _mode(groups, "parts"):
            got = run()
    except Exception as error:  # noqa: BLE001  # such as a view that only contiguous results have
        return f"the model does not take merged results ({_said(error)})"
    difference = relative_difference(got, want)  # none, but for models whose sums are not repeatable
    limit = _tolerance(groups[0][0])
    return None if difference <= limit else f"the model's logits differ by {difference:.2g}"


def _tolerance(layer: nn.Module) -> float:
    dtype = dtype_of(layer)
    assert dtype is not None, "a merged layer has a weight"
    return TOLERANCES[dtype]


@contextmanager
def _mode(groups: list[list[MergedLinear]], mode: Mode) -> Iterator[None]:
    products = [layers[0].merged_product for layers in groups]
    for product in products:
        product.mode = mode
    try:
        yield
    finally:
        for product in products:
            product.mode = "whole"
            product.forget()


def _part(layers: list[MergedLinear], reason: str, report: MergeReport) -> None:
    report.dropped[reason] += len(layers)
    for layer in layers:
        part_ways(layer)


def _part_what_moved(model: nn.Module) -> None:
    """Undo products whose layers were moved or changed since."""
    layers = [m for m in model.modules() if isinstance(m, MergedLinear)]
    moved = {id(m.merged_product) for m in layers if not _is_held(m)}
    for layer in layers:
        if id(layer.merged_product) in moved:
            part_ways(layer)


def _is_held(layer: MergedLinear) -> bool:
    return isinstance(layer, nn.Linear) and layer.merged_product.holds(layer)


def _weight_bytes(layer: nn.Linear) -> int:
    packed = packed_of(layer)
    if packed is not None:
        return packed.num_bytes
    eight = fp8_weight_of(layer)
    return eight.num_bytes if eight is not None else layer.weight.nbytes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
