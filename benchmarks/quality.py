"""What quantization costs in quality: perplexity and next-token accuracy of every scheme on held-out books.

Purpose: one table and one JSON file for a model and a split; bitsandbytes' formats in the same table.
Does not know: speed, how a row is made (see quality_rows.py).
Invariant: the record is on disk after every row; a row that fails is left out with its reason, the others
are measured.

    python -m benchmarks.quality --corpus CORPUS                      validation split, for choices
    python -m benchmarks.quality --corpus CORPUS --split test         final figures
    python -m benchmarks.quality --corpus CORPUS --device cuda --model FOLDER

On a CPU rows compute as the engine does there: native kernels, 8-bit activations, so their figures are what
users get. With --device cuda they compute in float32 on the dequantized weights, activations not rounded.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import ROOT, accelerator_facts, commit, machine_facts, usable_cpus, versions
from benchmarks.quality_rows import Books, Quality, Row
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.calibration import SEQUENCE_LENGTH, self_generated, spread
from training.corpus import num_bytes, read_books
from training.data import END_OF_TEXT_ID, encode_stream
from training.scoring import split_stream
from training.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
CHARS_FOR_A_PIECE = 16 * SEQUENCE_LENGTH  # of a book: far more than its tokens can take

Save = Callable[[dict[str, Any]], object]


def measure_rows(
    quality: Quality, budgets: Sequence[float], record: dict[str, Any], save: Save, until: float = math.inf
) -> list[Row]:
    """Measure every row until `until` (of time.monotonic()) is over; `save` gets the record after each.

    Raises whatever the first row does: the others are compared with it.
    """
    torch.set_float32_matmul_precision("highest")  # training allows TF32
    measured, left_out = list[Row](), dict[str, str]()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for name, measure in bar.track(quality.rows(budgets).items(), description="quality"):
            bar.update(bar.task_ids[0], description=name)
            if time.monotonic() > until:
                left_out[name] = "no time was left"
                continue
            try:
                measured.append(measure())
                logger.info("%s: perplexity %.3f", name, measured[-1].perplexity)
            except ImportError as error:
                left_out[name] = str(error)
            except Exception as error:  # the boundary of one row: deliver the others
                if not measured:
                    raise
                logger.exception("%s failed", name)
                left_out[name] = f"{type(error).__name__}: {error}"
            save(record | {"rows": [asdict(row) for row in measured], "left_out": left_out})
    save(record | {"rows": [asdict(row) for row in measured], "left_out": left_out})
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)
    return measured


def held_out(corpus: Path, split: str, tokenizer: Path, tokens_per_book: int | None) -> Books:
    """The books of a split, each with at most so many tokens (its separator counted)."""
    books = read_books(corpus, split)
    stream = torch.from_numpy(encode_stream(load_tokenizer(tokenizer), books).astype("int32"))
    parts = [part[:tokens_per_book] for part in split_stream(stream, END_OF_TEXT_ID)]
    return Books(parts, num_bytes(books))


def middles(books: Sequence[str], tokenizer: Path, num_tokens: int) -> torch.Tensor:
    """A piece from the middle of each book `[B, T]`, of books evenly spread over all: about `num_tokens`."""
    chosen = spread(torch.arange(len(books)), -(-num_tokens // SEQUENCE_LENGTH)).tolist()
    encoder, pieces = load_tokenizer(tokenizer), list[list[int]]()
    for book in (books[index] for index in chosen):
        text = book[len(book) // 2 :][:CHARS_FOR_A_PIECE]
        pieces.append(encoder.encode(text, add_special_tokens=False).ids[:SEQUENCE_LENGTH])
    length = min(map(len, pieces))
    return torch.tensor([piece[:length] for piece in pieces])


def record_of(quality: Quality, *, model: str, split: str, calibration: str) -> dict[str, Any]:
    """What the rows stand for."""
    return {
        "model": model, "split": split, "tokens": quality.books.num_tokens,
        "device": quality.device.type, "arithmetic": quality.arithmetic, "calibration": calibration,
        "machine": machine_facts(usable_cpus()) | accelerator_facts(quality.device.type),
        "versions": versions(), "commit": commit(),
    }  # fmt: skip


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the file as a whole, so that it is never half a record."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    folder = resolve_model(options.model)
    books = held_out(options.corpus, options.split, folder, options.tokens_per_book)
    text: Callable[[Any], torch.Tensor] = partial(
        self_generated, num_tokens=options.calibration_tokens, seed=0
    )
    if options.calibration == "train":
        pieces = middles(read_books(options.corpus, "train"), folder, options.calibration_tokens)
        text = lambda _: pieces  # noqa: E731
    device = torch.device(options.device)
    quality = Quality(folder, books, text, _kernels(device), device)
    calibration = f"about {options.calibration_tokens} tokens of {options.calibration} text"
    record = record_of(quality, model=options.model, split=options.split, calibration=calibration)
    measured = measure_rows(quality, options.budgets, record, partial(write_record, options.output))
    print(markdown(measured))
    return 0


def _kernels(device: torch.device) -> Kernels | None:
    """What the engine computes with on this device; None for torch."""
    if device.type != "cpu":
        return None
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        sys.exit(f"native kernels are unavailable: {kernels.reason}")
    return kernels


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--tokens-per-book", type=int, metavar="N", help="score only so many of each book")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[4.25, 4.5, 4.8, 5.0, 5.5, 6.0, 7.0], metavar="BITS",
        help="bits per weight of the mixed plans (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", choices=("self-generated", "train"), default="self-generated",
        help="text for importances and mixed plans: the model's own, or from the train books",
    )  # fmt: skip
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of it (default: %(default)s)")
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
