"""Bytes of a model's weights as loading leaves them, whatever the checkpoint holds.

Purpose: float weights as they are or quantized while loading, and checkpoints quantized already.
Does not know: KV caches, what else a process takes.
Invariant: weights are counted in the layout of the kernels that will compute with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.memory.checkpoints import (
    check_own_description,
    header_bytes,
    stored_plan,
    title_of,
)
from memory_efficient_gpt.memory.shape_check import check_shapes
from memory_efficient_gpt.memory.weights import (
    Architecture,
    Layout,
    name_of_plan,
    peak_while_quantizing,
    quantized_bytes,
)
from memory_efficient_gpt.native.build import Unavailable, find_compiler
from memory_efficient_gpt.quantization import bitsandbytes
from memory_efficient_gpt.quantization.model import index_experts_one_by_one
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.triton_kernels.availability import triton_obstacle


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its `quantization_config` (None: float), its files (None: not here)."""

    settings: Mapping[str, Any] | None = None
    files: Sequence[Path] | None = None


@dataclass(frozen=True, slots=True)
class WeightFigures:
    """What becomes of the weights.

    peak_bytes: most of them at once while loading. taken_from_free: bytes that are no longer free once they
    are loaded; on a CPU those that are used as the files have them stay the page cache's.
    """

    num_bytes: int
    peak_bytes: int
    taken_from_free: int
    quantization: str | None = None
    notes: tuple[str, ...] = ()


def weight_figures(
    architecture: Architecture,
    source: Source,
    config: EngineConfig,
    device: torch.device,
    *,
    packed: bool,
) -> WeightFigures:
    """packed: whether the model runs packed, with all its layers' kernels (tier B).

    Raises ConfigError, CheckpointError or UnsupportedModelError as loading would.
    """
    layout = _layout(config, device)
    if source.settings is None:
        check_shapes(architecture, source.files or ())
        return _from_float(architecture, config, device, layout, packed)
    return _from_quantized(architecture, source.settings, source.files, config, layout, packed)


def _from_float(
    architecture: Architecture,
    config: EngineConfig,
    device: torch.device,
    layout: Layout,
    packed: bool,
) -> WeightFigures:
    size = architecture.float_bytes
    copied = device.type != "cpu" or architecture.is_converted
    if config.quantization is None:
        return WeightFigures(size, size, size if copied else 0)
    scheme = parse_scheme(config.quantization)
    if scheme.by_bitsandbytes:
        bitsandbytes.require()
    plan = uniform_plan(architecture.layers, scheme)
    num_bytes = quantized_bytes(architecture, plan, layout, pack_experts=packed)
    peak = num_bytes if device.type == "cpu" else peak_while_quantizing(architecture, plan, num_bytes)
    notes: tuple[str, ...] = ()
    if peak > num_bytes:
        notes = (
            f"quantized while loading, which takes {peak / 1e9:.2f} GB for a moment; "
            "a folder that `megpt quantize` wrote does not",
        )
    name = name_of_plan(architecture.layers, plan)
    if any(layer.role == "experts" and plan[layer.name].kind != "none" for layer in architecture.layers):
        index_experts_one_by_one(architecture.model)
    return WeightFigures(num_bytes, peak, num_bytes, name, notes)


def _from_quantized(
    architecture: Architecture,
    settings: Mapping[str, Any],
    files: Sequence[Path] | None,
    config: EngineConfig,
    layout: Layout,
    packed: bool,
) -> WeightFigures:
    title = title_of(settings)
    if files is None:
        raise CheckpointError(
            f"{config.model} is quantized ({title}), and how large that makes it is in its weight files, "
            "which are not here. Download it, or plan with the checkpoint it was made from."
        )
    plan = stored_plan(settings, files, architecture)
    if plan is None:
        if bitsandbytes.describes(settings):
            bitsandbytes.require(to_load=True)
        _refuse_another(config, title)
        size = header_bytes(files, architecture.dtype)
        return WeightFigures(size, size, size, title)
    name = name_of_plan(architecture.layers, plan)
    _refuse_another(config, name or "bf16")
    size = quantized_bytes(architecture, plan, layout, pack_experts=packed)
    check_own_description(settings, architecture)
    return WeightFigures(size, size, size, name)


def _refuse_another(config: EngineConfig, present: str) -> None:
    """Quantized weights are not quantized again."""
    if config.quantization is not None and str(parse_scheme(config.quantization)) != present:
        raise ConfigError(
            [f"{config.model} is quantized already, as {present}; {config.quantization} was asked for. "
             "Leave quantization out, or give the checkpoint it was made from."]
        )  # fmt: skip


def _layout(config: EngineConfig, device: torch.device) -> Layout:
    """Of the kernels that there will be; those of a GPU that is not here are taken for granted."""
    if not config.native_kernels:
        return "stored"
    if device.type == "cpu":
        return "stored" if isinstance(find_compiler(), Unavailable) else "native"
    usable = not torch.cuda.is_available() or triton_obstacle(device) is None
    return "triton" if usable else "stored"
