"""`megpt quantize`, done: load, calibrate, measure, quantize, write.

Purpose: carry a checked job out, one phase after the other.
Does not know: arguments, how progress and results are shown.
Invariant: the folder appears whole or not at all; whatever ends the run, nothing else is left on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import torch

from memory_efficient_gpt.hardware import free_memory_bytes
from memory_efficient_gpt.loading import load_model
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.budget import MixedPlan, choose_schemes
from memory_efficient_gpt.quantization.calibration import second_moments, self_generated
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.groups import bits_range, group_layers
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.model import QuantizationReport, quantize_model
from memory_efficient_gpt.quantization.plans import Plan, bits_per_weight, pins, uniform_plan
from memory_efficient_gpt.quantization.sensitivity import Quantizer, Reference, measure
from memory_efficient_gpt_server.commands.quantize_checks import (
    GPTQ_GENERATED_TOKENS,
    SELF_GENERATED_TOKENS,
    Job,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY_SHARE: Final = 0.7
"""Of the free memory, for float32 weights; the rest is for activations and predictions."""


class Progress(Protocol):
    """Takes a phase, what is being done in it, and the share of the phase that is done."""

    def __call__(self, phase: str, what: str, share: float) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What was found and written. divergence: of the quantized model, measured; None without a text.

    measured_tokens: those of the text on which predictions are compared, of calibration_tokens that tell what
    goes into layers. rounded: layers by how; searched: those that were not as asked for, by why. on_others:
    whether predictions were compared on other texts than weights were rounded with.
    """

    bits_per_weight: float
    bytes_before: int
    schemes: Plan
    plan: MixedPlan | None = None
    measured_tokens: int = 0
    calibration_tokens: int = 0
    measured_in: str = ""
    bytes_after: int | None = None
    divergence: float | None = None
    rounded: dict[str, int] = field(default_factory=dict)
    searched: dict[str, int] = field(default_factory=dict)
    on_others: bool = True


def carry_out(job: Job, progress: Progress) -> Outcome:
    """Do it; returns what became of it. Raises what loading raises, MegptError if it can't write."""
    progress("loading", job.model, 0.0)
    stored = _stored_dtype(job)
    model = load_model(job.folder, job.config, dtype=_dtype(job, stored), device=job.device)
    reference, moments, num_tokens = None, None, 0
    if job.needs_text:
        text = _text(job, model, progress)
        num_tokens = text.numel()
        moments = second_moments(model, text, progress=partial(progress, "calibrating"))
        reference = Reference(model, text)
    layers = find_layers(model)
    # what a layer's scheme costs is measured by the search, which ranks them alike and takes no minutes each
    quantizer = Quantizer(job.rounding if job.rounding != "gptq" else "search", moments, _kernels(job.device))
    mixed = None
    if reference is not None and (job.bits is not None or job.out is None):
        mixed = _measured_plan(job, layers, reference, quantizer, progress)
    schemes = mixed.schemes if mixed is not None else uniform_plan(layers, job.schemes[0], rules=job.rules)
    outcome = Outcome(bits_per_weight(layers, schemes), _size(job.weight_files), schemes, mixed)
    if reference is not None:
        outcome.measured_tokens, outcome.measured_in = reference.num_tokens, _name(model.dtype)
        outcome.calibration_tokens = num_tokens
    if job.out is not None:
        unmeasured = reference.unmeasured if reference is not None else None
        report = _quantize(job, model, schemes, quantizer, unmeasured, progress)
        outcome.rounded, outcome.searched = dict(report.rounded), dict(report.searched)
        if reference is not None and "gptq" in report.rounded:
            outcome.on_others = reference.measures_others
        outcome.divergence = reference.divergence() if reference is not None else None
        progress("writing", str(job.out), 0.0)
        cast(torch.nn.Module, model).to(stored)  # transformers wraps `to` without types
        outcome.bytes_after = _write(model, job.out, job.folder)
    return outcome


def _stored_dtype(job: Job) -> torch.dtype:
    """That of the checkpoint's weights: of what stays float, and what quantized layers compute in."""
    stored: Any = getattr(job.config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _dtype(job: Job, stored: torch.dtype) -> torch.dtype:
    """float32 for measuring, where there is memory: bfloat16's own rounding changes predictions, too."""
    size = _size(job.weight_files) * 4 // stored.itemsize
    measured = job.needs_text and size <= MEMORY_SHARE * free_memory_bytes(job.device)
    return torch.float32 if measured else stored


def _text(job: Job, model: PreTrainedModel, progress: Progress) -> torch.Tensor:
    if job.text is not None:
        return job.text
    usual = GPTQ_GENERATED_TOKENS if job.rounding == "gptq" else SELF_GENERATED_TOKENS
    num_tokens = job.generated_tokens or usual
    return self_generated(model, num_tokens, job.seed, progress=partial(progress, "calibrating"))


def _measured_plan(
    job: Job, layers: Sequence[Layer], reference: Reference, quantizer: Quantizer, progress: Progress
) -> MixedPlan:
    """The best mix within the budget; for one scheme, that scheme, with what it does to each group."""
    pinned: Plan = (
        uniform_plan(layers, job.schemes[0], rules=job.rules) if job.bits is None else pins(layers, job.rules)
    )
    groups = group_layers(layers, pinned, tied=job.tied)
    measured = measure(
        reference, groups, job.schemes, quantizer, exact=job.exact, progress=partial(progress, "measuring")
    )
    return choose_schemes(measured, job.bits if job.bits is not None else bits_range(groups, ())[1])


def _quantize(
    job: Job, model: PreTrainedModel, schemes: Plan, quantizer: Quantizer, text: torch.Tensor | None,
    progress: Progress,
) -> QuantizationReport:  # fmt: skip
    return quantize_model(
        model,
        schemes,
        rounding=job.rounding,
        importances=quantizer.importances,
        text=text,
        kernels=quantizer.kernels,
        progress=partial(progress, "quantizing"),
    )


def _write(model: PreTrainedModel, out: Path, source: Path) -> int:
    """Write `out`; returns the bytes of the weights."""
    model.config.dtype = model.dtype
    save_quantized(model, out, source=source)
    return _size(sorted(out.glob("*.safetensors")))


def _kernels(device: torch.device) -> Kernels | None:
    kernels = load_kernels() if device.type == "cpu" else None
    return None if isinstance(kernels, Unavailable) else kernels


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
