"""Ways to store a model, each measured on the same tokens.

Purpose: quantize a fresh copy of a model in one way, count its bits and bytes, score it.
Does not know: command lines, files of results, how the model was trained.
Invariant: every row scores the same tokens with the same windows; bits count scales and offsets.

With native kernels, rows compute as the engine does on a CPU (activations rounded to 8 bits); without, in
float32 on the dequantized weights, which is what schemes cost by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from memory_efficient_gpt.loading import load_config, load_model
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.quantization.budget import DEFAULT_OPTIONS, choose_schemes
from memory_efficient_gpt.quantization.calibration import second_moments
from memory_efficient_gpt.quantization.groups import group_layers
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.model import give_kernels, quantize_model, weight_bytes
from memory_efficient_gpt.quantization.plans import bits_per_weight, uniform_plan
from memory_efficient_gpt.quantization.rounding import Rounding
from memory_efficient_gpt.quantization.scheme import UNQUANTIZED, Scheme, parse_scheme
from memory_efficient_gpt.quantization.sensitivity import Quantizer, Reference, Sensitivity, measure
from training.evaluate import logits_function
from training.scoring import Score, score_books

UNIFORM: Sequence[tuple[str, Rounding]] = (
    ("int8", "search"), ("int8-g64", "search"), ("int4", "nearest"), ("int4", "search"),
    ("int4-g64", "search"),
    ("int4-g128", "nearest"), ("int4-g128", "search"), ("int4-asym-g64", "nearest"),
    ("int4-asym-g64", "search"), ("int4-asym-g64", "hqq"), ("fp8", "nearest"),
)  # fmt: skip
WEIGHTED = ("int4",)
GPTQ = ("int4", "int4-g64", "int4-g128", "int4-asym-g64", "int4-asym", "int8")
BITSANDBYTES = ("nf4", "nf4, double quantization", "fp4", "int8")
ROWS_AT_ONCE = {"cpu": 2, "cuda": 16}  # windows


@dataclass(frozen=True, slots=True)
class Row:
    """One way to store the model. bits: of all quantizable weights; bytes: of the whole model."""

    name: str
    bits: float
    bytes: int
    perplexity: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Books:
    """A split as tokens."""

    parts: list[torch.Tensor]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored: all but the separator before each book."""
        return sum(len(part) - 1 for part in self.parts)

    def score(self, model: Any) -> Score:
        """Windows as long as the model's positions, none overlapping."""
        window = int(model.config.max_position_embeddings)
        parts = [part.to(model.device) for part in self.parts]
        rows = ROWS_AT_ONCE[model.device.type]
        with torch.inference_mode():
            return score_books(logits_function(model), parts, self.num_bytes, window, window, rows=rows)


class Quality:
    """The rows of one model's table.

    text: tokens `[B, T]` to calibrate on, made from the float model. kernels: native ones, on a CPU.
    """

    def __init__(
        self,
        folder: Path,
        books: Books,
        text: Callable[[Any], torch.Tensor],
        kernels: Kernels | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    ) -> None:
        self.folder, self.books, self.text = folder, books, text
        self.kernels, self.device = kernels, device

    @property
    def arithmetic(self) -> str:
        """How rows compute, for the record."""
        if self.kernels is not None:
            return "native kernels: 8-bit activations, float32 sums"
        return "float32 on dequantized weights (no TF32); activations are not rounded"

    def rows(self, budgets: Sequence[float]) -> dict[str, Callable[[], Row]]:
        """What to measure, by name; bf16 comes first."""
        found: dict[str, Callable[[], Row]] = {"bf16": self.unquantized}
        found |= {f"{scheme}, {how}": partial(self.uniform, scheme, how) for scheme, how in UNIFORM}
        found |= {f"{scheme}, weighted search": partial(self.weighted, scheme) for scheme in WEIGHTED}
        found |= {f"{scheme}, gptq": partial(self.gptq, scheme) for scheme in GPTQ}
        found |= {f"mixed, {budget:g} bits": partial(self.mixed, budget) for budget in budgets}
        return found | {f"bitsandbytes {kind}": partial(self.bitsandbytes, kind) for kind in BITSANDBYTES}

    def load(self) -> Any:
        """The model with float32 arithmetic on its own weights."""
        return load_model(self.folder, load_config(self.folder), dtype=torch.float32, device=self.device)

    def row(self, name: str, change: Callable[[Any, list[Layer]], tuple[float, int]]) -> Row:
        """Load, let `change` quantize and give (bits, bytes), score."""
        started = time.monotonic()
        model = self.load()
        bits, size = change(model, find_layers(model))
        score = self.books.score(model)
        return Row(name, bits, size, score.perplexity, score.accuracy, time.monotonic() - started)

    def unquantized(self) -> Row:
        """The model as it is."""
        return self.row("bf16", lambda model, _: (16.0, weight_bytes(model) // 2))

    def uniform(self, scheme: str, rounding: Rounding) -> Row:
        """One scheme for all layers, 8 bits for embedding and head."""

        def change(model: Any, layers: list[Layer]) -> tuple[float, int]:
            plan = uniform_plan(layers, parse_scheme(scheme))
            quantize_model(model, plan, rounding=rounding, kernels=self.kernels)
            return bits_per_weight(layers, plan), self._finish(model)

        return self.row(f"{scheme}, {rounding}", change)

    def weighted(self, scheme: str) -> Row:
        """As `uniform`, errors weighted by how large each input is."""
        plan = uniform_plan(find_layers(self.load()), parse_scheme(scheme))
        return self.planned(f"{scheme}, weighted search", plan)

    def gptq(self, scheme: str) -> Row:
        """As `uniform`, each code making up for the errors of those before it."""
        plan = uniform_plan(find_layers(self.load()), parse_scheme(scheme))
        return self.planned(f"{scheme}, gptq", plan, "gptq")

    def mixed(self, budget: float) -> Row:
        """The best plan of `budget` bits a weight by the measured sensitivities, rounded by gptq."""
        plan = choose_schemes(self.sensitivities, budget).schemes
        return self.planned(f"mixed, {budget:g} bits", plan, "gptq")

    def planned(self, name: str, plan: dict[str, Scheme], rounding: Rounding = "search") -> Row:
        """A scheme for each layer, errors weighted by importance."""
        importances, text = self.importances, self.calibration

        def change(model: Any, layers: list[Layer]) -> tuple[float, int]:
            quantize_model(
                model, plan, rounding=rounding, importances=importances, text=text, kernels=self.kernels
            )
            return bits_per_weight(layers, plan), self._finish(model)

        return self.row(name, change)

    @cached_property
    def calibration(self) -> torch.Tensor:
        """The text `[B, T]`."""
        return self.text(self.load())

    @cached_property
    def importances(self) -> dict[str, torch.Tensor]:
        """Mean squares of each layer's inputs."""
        return second_moments(self.load(), self.calibration)

    @cached_property
    def sensitivities(self) -> list[Sensitivity]:
        """What each scheme does to each layer, alone."""
        model = self.load()
        groups = group_layers(find_layers(model), tied=False)
        quantizer = Quantizer("search", self.importances, self.kernels)
        return measure(Reference(model, self.calibration), groups, DEFAULT_OPTIONS, quantizer)

    def bitsandbytes(self, kind: str) -> Row:
        """Linear layers in bitsandbytes' format, computed on dequantized weights; both ends in our int8."""
        from bitsandbytes import functional  # first: without it there is nothing to load a model for

        def change(model: Any, layers: list[Layer]) -> tuple[float, int]:
            linear = [layer for layer in layers if layer.role == "linear"]
            bits = {"nf4": 4.5, "fp4": 4.5, "nf4, double quantization": 4 + 8 / 64 + 32 / (64 * 256)}
            for layer in linear:
                layer.weight().copy_(_through_bitsandbytes(functional, layer.weight(), kind))
            plan = uniform_plan(layers, UNQUANTIZED) | {
                layer.name: parse_scheme("int8") for layer in layers if layer.role != "linear"
            }
            quantize_model(model, plan, kernels=self.kernels)
            total = saved = 0.0
            for layer in layers:
                n, k = layer.shape
                each = bits.get(kind, 8 + 32 / k) if layer.role == "linear" else 8 + 16 / k
                total += n * k
                saved += n * k * each
            kept = sum(p.numel() for p in model.parameters()) - sum(
                layer.shape[0] * layer.shape[1] for layer in linear
            )
            return saved / total, int(saved / 8) + 2 * kept

        return self.row(f"bitsandbytes {kind}", change)

    def _finish(self, model: Any) -> int:
        """Bytes as stored, what stays float being bf16; then compute as the engine does."""
        kept = sum(p.numel() * p.element_size() for p in model.parameters())
        size: int = weight_bytes(model) - kept // 2
        if self.kernels is not None:
            give_kernels(model, self.kernels)
        return size


def _through_bitsandbytes(functional: Any, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """weight `[N, K]` float32, quantized and back."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        eight_bit: torch.Tensor = codes.float() * scales.float().unsqueeze(1) / 127.0
        return eight_bit
    double = "double" in kind
    quantized, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=kind.split(",")[0], compress_statistics=double
    )
    restored: torch.Tensor = functional.dequantize_4bit(quantized, state)
    return restored.float()
