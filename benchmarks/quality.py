"""What quantization costs in quality: perplexity and next-token accuracy of every scheme on held-out books.

Purpose: one table and one JSON file for a model and a split; bitsandbytes' formats in the same table.
Does not know: speed.
Invariant: every row scores the same tokens with the same windows; ours compute as the engine does on a CPU
(native kernels, 8-bit activations), so their figures are what users get; bits count scales and offsets.

    python -m benchmarks.quality --corpus CORPUS                      validation split, for choices
    python -m benchmarks.quality --corpus CORPUS --split test         final figures
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from memory_efficient_gpt.loading import load_config, load_model, resolve_model
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.budget import DEFAULT_OPTIONS, choose_schemes
from memory_efficient_gpt.quantization.calibration import second_moments, self_generated
from memory_efficient_gpt.quantization.groups import group_layers
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.model import give_kernels, quantize_model, weight_bytes
from memory_efficient_gpt.quantization.plans import bits_per_weight, uniform_plan
from memory_efficient_gpt.quantization.rounding import Rounding
from memory_efficient_gpt.quantization.scheme import UNQUANTIZED, Scheme, parse_scheme
from memory_efficient_gpt.quantization.sensitivity import Quantizer, Reference, measure
from training.corpus import num_bytes, read_books
from training.data import END_OF_TEXT_ID, encode_stream
from training.evaluate import logits_function
from training.scoring import Score, score_books, split_stream
from training.tokenizer import load_tokenizer

UNIFORM: Sequence[tuple[str, Rounding]] = (
    ("int8", "search"), ("int8-g64", "search"), ("int4", "nearest"), ("int4", "search"),
    ("int4-g64", "search"),
    ("int4-g128", "nearest"), ("int4-g128", "search"), ("int4-asym-g64", "nearest"),
    ("int4-asym-g64", "search"), ("int4-asym-g64", "hqq"), ("fp8", "nearest"),
)  # fmt: skip
BITSANDBYTES = ("nf4", "nf4, double quantization", "fp4", "int8")


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

    def score(self, model: Any) -> Score:
        """Windows as long as the model's positions, none overlapping."""
        window = int(model.config.max_position_embeddings)
        with torch.inference_mode():
            return score_books(logits_function(model), self.parts, self.num_bytes, window, window, rows=2)


class Quality:
    """The rows of one model's table."""

    def __init__(self, folder: Path, books: Books, kernels: Kernels | None) -> None:
        self.folder, self.books, self.kernels = folder, books, kernels

    def load(self) -> Any:
        """The model with float32 arithmetic on its own weights."""
        config = load_config(self.folder)
        return load_model(self.folder, config, dtype=torch.float32, device=torch.device("cpu"))

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

    def planned(self, name: str, plan: dict[str, Scheme], importances: dict[str, torch.Tensor]) -> Row:
        """A plan of mixed precision."""

        def change(model: Any, layers: list[Layer]) -> tuple[float, int]:
            quantize_model(model, plan, importances=importances, kernels=self.kernels)
            return bits_per_weight(layers, plan), self._finish(model)

        return self.row(name, change)

    def bitsandbytes(self, kind: str) -> Row:
        """Linear layers in bitsandbytes' format, computed on dequantized weights; both ends in our int8."""

        def change(model: Any, layers: list[Layer]) -> tuple[float, int]:
            linear = [layer for layer in layers if layer.role == "linear"]
            bits = {"nf4": 4.5, "fp4": 4.5, "nf4, double quantization": 4 + 8 / 64 + 32 / (64 * 256)}
            for layer in linear:
                layer.weight().copy_(_through_bitsandbytes(layer.weight(), kind))
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


def _through_bitsandbytes(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """weight `[N, K]` float32, quantized and back."""
    from bitsandbytes import functional

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


def rows(quality: Quality, budgets: Sequence[float], tokens: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What to measure, by name."""
    yield "bf16", quality.unquantized
    for scheme, rounding in UNIFORM:
        yield f"{scheme}, {rounding}", partial(quality.uniform, scheme, rounding)
    if find_spec("bitsandbytes") is not None:
        for kind in BITSANDBYTES:
            yield f"bitsandbytes {kind}", partial(quality.bitsandbytes, kind)
    if budgets:
        plans, importances = mixed_plans(quality, budgets, tokens)
        for budget, plan in plans.items():
            name = f"mixed, {budget:g} bits"
            yield name, partial(quality.planned, name, plan, importances)


def mixed_plans(
    quality: Quality, budgets: Sequence[float], tokens: int
) -> tuple[dict[float, dict[str, Scheme]], dict[str, torch.Tensor]]:
    """Plans by budget, measured on text that the model writes itself, and the importances it showed."""
    model = quality.load()
    text = self_generated(model, tokens, seed=0)
    importances = second_moments(model, text)
    quantizer = Quantizer("search", importances, quality.kernels)
    groups = group_layers(find_layers(model), tied=False)
    measured = measure(Reference(model, text), groups, DEFAULT_OPTIONS, quantizer)
    return {budget: choose_schemes(measured, budget).schemes for budget in budgets}, importances


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = parse(argv)
    books = read_books(options.corpus, options.split)
    folder = resolve_model(options.model)
    stream = torch.from_numpy(encode_stream(load_tokenizer(folder), books).astype("int32"))
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        sys.exit(f"native kernels are unavailable: {kernels.reason}")
    parts = [part[: options.tokens_per_book] for part in split_stream(stream, END_OF_TEXT_ID)]
    quality = Quality(folder, Books(parts, num_bytes(books)), kernels)
    measured: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)
        for name, measure in rows(quality, options.budgets, options.calibration_tokens):
            bar.update(task, description=name, advance=1)
            measured.append(measure())
    print(markdown(measured))
    record = {
        "model": options.model, "split": options.split, "tokens": sum(len(p) - 1 for p in parts),
        "machine": machine_facts(usable_cpus()), "versions": versions(), "commit": commit(),
        "rows": [asdict(row) for row in measured],
    }  # fmt: skip
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder with valid.txt.xz and test.txt.xz")
    parser.add_argument(
        "--split", choices=("valid", "test"), default="valid", help="test: final figures only"
    )
    parser.add_argument("--model", default="demo", help="a model with the bundled tokenizer (default: demo)")
    parser.add_argument("--tokens-per-book", type=int, metavar="N", help="score only so many of each book")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[4.25, 4.5, 4.8, 5.0, 5.5, 6.0, 7.0], metavar="BITS",
        help="bits per weight of the mixed plans (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, default=4096, help="self-generated, for mixed plans"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantization_quality.json"
    )
    return parser.parse_args(argv)


def markdown(measured: Sequence[Row]) -> str:
    """The report; changes are against the first row."""
    base = measured[0]
    lines = [
        "| | bits a weight | model, MB | perplexity | | accuracy | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in measured:
        worse, lost = row.perplexity / base.perplexity - 1, row.accuracy / base.accuracy - 1
        lines.append(
            f"| {row.name} | {row.bits:.3f} | {row.bytes / 1e6:.2f} | {row.perplexity:.3f} | {worse:+.2%} "
            f"| {row.accuracy:.2%} | {lost:+.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
