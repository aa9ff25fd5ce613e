"""Scores finished model folders on a held-out split, after rounding to bf16.

Purpose: bits per byte, perplexity and accuracy of any Hugging Face folder with the shared tokenizer,
    and the same text under general-purpose compressors for comparison; how often a draft model agrees.
Doesn't know: how the models were trained.
Invariant: weights are what the folder holds (bf16), arithmetic is float32; the test split is read only
    when it is asked for by name.
"""

import argparse
import bz2
import json
import logging
import lzma
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.corpus import num_bytes, read_books
from training.data import END_OF_TEXT_ID, encode_stream
from training.scoring import LogitsFunction, score_books, split_stream
from training.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def compressor_bits_per_byte(books: list[str]) -> dict[str, float]:
    """Bits per byte of all books in one file under common compressors at their strongest setting."""
    data = "\n\n".join(books).encode()
    sizes = {
        "gzip -9": len(zlib.compress(data, 9)),
        "bzip2 -9": len(bz2.compress(data, 9)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: round(8 * size / len(data), 4) for name, size in sizes.items()}


def load_model(folder: Path, device: torch.device) -> nn.Module:
    """The folder's model with float32 arithmetic on its bf16 weights."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


def logits_function(model: nn.Module) -> LogitsFunction:
    """Token ids [B, T] -> logits [B, T, V] of a transformers model."""

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits

    return logits_of


def evaluate_folder(
    folder: Path, books: list[str], device: torch.device, stride: int | None, rows: int
) -> dict[str, Any]:
    """The figures of one folder; windows are as long as the model's positions, `stride` half of it."""
    model = load_model(folder, device)
    window = int(model.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
    stride = stride or window // 2
    stream = torch.from_numpy(encode_stream(load_tokenizer(folder), books).astype("int32")).to(device)
    parts = split_stream(stream, END_OF_TEXT_ID)
    score = score_books(logits_function(model), parts, num_bytes(books), window, stride, rows)
    return {
        "bits_per_byte": round(score.bits_per_byte, 4),
        "perplexity_per_token": round(score.perplexity, 3),
        "next_token_accuracy": round(score.accuracy, 4),
        "tokens": score.tokens,
        "bytes": score.bytes,
        "window": window,
        "stride": stride,
    }


@torch.no_grad()
def agreement(
    target: nn.Module, draft: nn.Module, tokens: torch.Tensor, length: int = 512
) -> dict[str, float]:
    """How often a draft's proposal stands, on held-out text in windows of `length` tokens.

    `greedy`: both models' first choices are equal. `sampled`: the expected acceptance of speculative
    sampling at temperature 1, the sum over tokens of the smaller of both probabilities.
    """
    windows = tokens[: len(tokens) // length * length].view(-1, length).long()
    same, overlap = 0.0, 0.0
    for batch in windows.split(8):
        p, q = (logits_function(model)(batch).softmax(-1) for model in (target, draft))
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        overlap += float(torch.minimum(p, q).sum())
    return {"greedy": round(same / windows.numel(), 4), "sampled": round(overlap / windows.numel(), 4)}


def main() -> None:
    """Command line: evaluate folders on one split, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with valid.txt.xz and test.txt.xz")
    parser.add_argument(
        "--split", choices=("valid", "test"), default="valid", help="test: final figures only"
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="model folders")
    parser.add_argument("--draft-of", type=Path, help="also: agreement of the last model with this one")
    parser.add_argument("--stride", type=int, help="tokens scored by a window (default: half of it)")
    parser.add_argument("--rows", type=int, default=4, help="windows at once (default 4)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    device, books = torch.device(args.device), read_books(args.corpus, args.split)
    report: dict[str, Any] = {
        "split": args.split,
        "compressors": compressor_bits_per_byte(books),
        "models": {},
    }
    for folder in args.models:
        report["models"][folder.name] = evaluate_folder(folder, books, device, args.stride, args.rows)
        logger.info("%s: %s", folder.name, report["models"][folder.name])
    if args.draft_of:
        stream = encode_stream(load_tokenizer(args.draft_of), books).astype("int32")[: 2**16]
        target, draft = load_model(args.draft_of, device), load_model(args.models[-1], device)
        report["draft_agreement"] = agreement(target, draft, torch.from_numpy(stream).to(device))
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
