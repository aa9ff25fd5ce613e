"""How quantization schemes rank on a model of 100 million parameters: trains one, measures every scheme.

Purpose: one command from a corpus to two records, `quality_model.json` (how it was trained) and
`quantization_quality.json` (the rows of benchmarks.quality); the model itself is thrown away.
Does not know: the training loop, how a row is made.
Invariant: the test split is read after training is over; training ends in time however fast the machine is,
with a learning rate of zero.

    python -m benchmarks.quality_model --corpus CORPUS --out FOLDER --minutes 5

Rows compute in float32 on dequantized weights, on any device. Calibration text comes from the train books.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, accelerator_facts, commit, versions
from benchmarks.quality import held_out, markdown, measure_rows, middles, record_of, write_record
from benchmarks.quality_rows import Quality, Row
from memory_efficient_gpt.loading import resolve_model
from training.corpus import num_bytes, read_books
from training.data import Streams, encode_stream
from training.export import export_folder
from training.settings import RunSettings, read_run
from training.tokenizer import load_tokenizer
from training.train import CARD, train

logger = logging.getLogger(__name__)
CONFIG = ROOT / "training" / "configs" / "quality.yaml"
TOKENIZER = "demo"
SHARE_OF_STEPS = 0.97  # of the minutes; the rest is for the last validation and the model's files
BUDGETS = (4.5, 4.8, 5.0, 5.5, 6.0)
CALIBRATION_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams to train on, and text from the train books to calibrate on `[B, T]`."""

    streams: Streams
    calibration: torch.Tensor


def read_corpus(folder: Path, tokenizer: Path, device: torch.device) -> Corpus:
    """Tokenize the train and valid splits, in memory; no conversations."""
    books = {split: read_books(folder, split) for split in ("train", "valid")}
    encoder = load_tokenizer(tokenizer)
    arrays = {split: encode_stream(encoder, texts).astype(np.int32) for split, texts in books.items()}
    train_stream, valid = (torch.from_numpy(arrays[split]).to(device) for split in ("train", "valid"))
    streams = Streams(train_stream, train_stream[:0], valid, num_bytes(books["valid"]))
    return Corpus(streams, middles(books["train"], tokenizer, CALIBRATION_TOKENS))


def train_model(
    run: RunSettings, streams: Streams, tokenizer: Path, folder: Path, *, until: float, compiled: bool = True
) -> dict[str, Any]:
    """Train until `until` (of time.monotonic()), write the model's folder, give its record."""
    trained = train(run, streams, until=until, compiled=compiled)
    export_folder(run.model, trained.model.state_dict(), tokenizer, CARD.format(name=run.name), folder)
    summary = trained.summary(run)
    summary["epochs"] = round(summary["tokens"] / len(streams.train), 2)
    return summary | {"versions": versions()} | accelerator_facts(streams.train.device.type)


def make_model(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """The record of a model trained into `folder`, and text to calibrate on."""
    until = time.monotonic() + SHARE_OF_STEPS * 60 * options.minutes
    tokenizer, run = resolve_model(TOKENIZER), read_run(options.config)
    corpus = read_corpus(options.corpus, tokenizer, torch.device(options.device))
    logger.info("%s train tokens", f"{len(corpus.streams.train):,}")
    compiled = not options.no_compile
    summary = train_model(run, corpus.streams, tokenizer, folder, until=until, compiled=compiled)
    return summary, corpus.calibration


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print a table."""
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        summary, calibration = make_model(options, Path(folder))
        write_record(options.out / "quality_model.json", summary | {"commit": options.commit})
        logger.info(title(summary))
        free_memory(torch.device(options.device))
        measured = measure_model(options, Path(folder), calibration, summary["parameters"])
    print(title(summary))
    print(markdown(measured))
    return 0


def measure_model(
    options: argparse.Namespace, folder: Path, calibration: torch.Tensor, parameters: int
) -> list[Row]:
    """Every row of the model in `folder`, in the time that is allowed."""
    until = time.monotonic() + 60 * options.quality_minutes
    books = held_out(options.corpus, options.split, folder, options.tokens_per_book)
    quality = Quality(folder, books, lambda _: calibration, device=torch.device(options.device))
    text = f"{calibration.numel()} tokens from the middles of {len(calibration)} train books"
    model = f"{parameters / 1e6:.3g} million parameters"
    record = record_of(quality, model=model, split=options.split, calibration=text)
    save = partial(write_record, options.out / "quantization_quality.json")
    return measure_rows(quality, options.budgets, record | {"commit": options.commit}, save, until)


def free_memory(device: torch.device) -> None:
    """Give back what training took: a graph and a model may hold each other."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def title(summary: dict[str, Any]) -> str:
    """One line about the model."""
    return (
        f"{summary['parameters'] / 1e6:.1f} million parameters, {summary['tokens'] / 1e6:.1f} million tokens "
        f"({summary['epochs']} epochs) in {summary['seconds']:.0f} s, "
        f"validation perplexity {summary['valid_perplexity']:.2f}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with {train,valid,test}.txt.xz")
    add("--out", type=Path, required=True, help="folder for the two records")
    add("--minutes", type=float, default=5.0, help="for training, all told (default: %(default)s)")
    add(
        "--quality-minutes", type=float, default=3.5,
        help="for measuring; rows that would begin later are left out (default: %(default)s)",
    )  # fmt: skip
    add("--config", type=Path, default=CONFIG, help="model and recipe (default: the repository's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--no-compile", action="store_true", help="do not compile the step on a GPU")
    add("--split", choices=("valid", "test"), default="test", help="scored (default: %(default)s)")
    add(
        "--tokens-per-book", type=int, default=65537, metavar="N",
        help="score only so many of each book (default: %(default)s)",
    )  # fmt: skip
    add("--budgets", type=float, nargs="*", default=BUDGETS, metavar="BITS", help="of the mixed plans")
    add(
        "--commit", default=os.environ.get("COMMIT") or commit(),
        help="for the records, where there is no git (default: $COMMIT, then git's)",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
