"""What an int8 KV cache costs: perplexity of held-out books through the engine, and bytes.

Purpose: the same windows once with each cache dtype; every key and value is read back from the cache.
Does not know: weights' quantization.
Invariant: both runs score the same tokens; only the cache differs.

    python -m benchmarks.kv_quality --corpus CORPUS --split test
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from memory_efficient_gpt.api import LLM
from memory_efficient_gpt.loading import resolve_model
from training.corpus import read_books
from training.data import END_OF_TEXT_ID, encode_stream
from training.scoring import split_stream
from training.tokenizer import load_tokenizer

DTYPES = ("bfloat16", "int8")


def measure(model: str, windows: Sequence[list[int]], kv_cache_dtype: str) -> dict[str, Any]:
    """Perplexity over all windows, and what a token takes in the cache."""
    nats, tokens = 0.0, 0
    with LLM(model, kv_cache_dtype=kv_cache_dtype, prefix_cache=False, progress=False) as llm:
        for done in llm.generate(
            list(windows), max_tokens=1, prompt_logprobs=0, temperature=0.0, progress=True
        ):
            scored = [entry.logprob for entry in done.prompt_logprobs if entry is not None]
            nats -= sum(scored)
            tokens += len(scored)
        info = llm.info
    slots = (info.num_kv_blocks + 1) * info.block_size
    return {
        "kv_cache_dtype": kv_cache_dtype,
        "perplexity": math.exp(nats / tokens),
        "tokens": tokens,
        "bytes_per_token": info.kv_cache_bytes / slots,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with valid.txt.xz and test.txt.xz")
    parser.add_argument(
        "--split", choices=("valid", "test"), default="valid", help="test: final figures only"
    )
    parser.add_argument("--model", default="demo", help="a model with the bundled tokenizer (default: demo)")
    parser.add_argument("--windows-per-book", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "kv_cache_quality.json"
    )
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(resolve_model(options.model))
    stream = torch.from_numpy(
        encode_stream(tokenizer, read_books(options.corpus, options.split)).astype("int32")
    )
    size = 2047  # a prompt and one new token
    windows = [
        book[start : start + size].tolist()
        for book in split_stream(stream, END_OF_TEXT_ID)
        for start in range(0, size * options.windows_per_book, size)
    ]
    rows = [measure(options.model, windows, dtype) for dtype in DTYPES]
    plain, small = rows
    print(f"perplexity {plain['perplexity']:.4f} -> {small['perplexity']:.4f}"
          f" ({small['perplexity'] / plain['perplexity'] - 1:+.3%}),"
          f" bytes a token {plain['bytes_per_token']:.0f} -> {small['bytes_per_token']:.0f}"
          f" ({small['bytes_per_token'] / plain['bytes_per_token'] - 1:+.1%})")  # fmt: skip
    record = {
        "model": options.model, "split": options.split, "machine": machine_facts(usable_cpus()),
        "versions": versions(), "commit": commit(), "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
