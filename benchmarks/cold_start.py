"""`python -m benchmarks.cold_start --device cuda --shape llama8b`: from a request to its first token, cold.

Purpose: what the first client of a model waits for, through the server: a model that is not loaded (its files
in the page cache), one that sleeps, one that is ready.
Does not know: the server's internals; it asks over HTTP.
Invariant: every round has each of the three once; a first token counts only if the whole answer is the one
that the model gave before. Weights are random, in a folder made for this; so is the tokenizer, of words.

    python -m benchmarks.cold_start --out cold_start_h200.json        an 8B shape on a GPU; about two minutes
    python -m benchmarks.cold_start --device cpu --shape tiny --out cold.json
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.engine_gpu import SHAPES, quantize, write_model
from benchmarks.machine import accelerator_facts, versions
from benchmarks.sleep_cpu import first_token, operate, summary
from benchmarks.watched_server import WatchedServer

PROMPT: Final = " ".join(f"w{number}" for number in range(3, 40))
SCHEME: Final = "int4-g128"


def write_tokenizer(folder: Path, words: int) -> None:
    """One token a word: w0, w1, and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "w0",
        "bos_token": "w1",
        "eos_token": "w2",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def play(client: httpx.Client, model: str, rounds: int, console: Console) -> dict[str, list[float]]:
    """All rounds of a model. Raises RuntimeError if an answer differs."""
    first_s, expected = first_token(client, model, PROMPT)
    found: dict[str, list[float]] = {"first_load_s": [first_s]}
    console.print(f"{model}: first load {first_s:.2f} s, {expected[:40]!r}...")

    def ask(name: str) -> None:
        seconds, text = first_token(client, model, PROMPT)
        if text != expected:
            raise RuntimeError(f"the answer differs ({name}): {text!r}, expected {expected!r}")
        found.setdefault(name, []).append(seconds)

    with progress_bar(console) as bar:
        for _ in bar.track(range(rounds), description=model):
            found.setdefault("unload_s", []).append(operate(client, model, "unload"))
            ask("cold_s")
            ask("ready_s")
            found.setdefault("sleep_s", []).append(operate(client, model, "sleep"))
            ask("asleep_s")
    operate(client, model, "unload")
    return found


def settings_of(folders: dict[str, Path], device: str) -> dict[str, Any]:
    """A server that loads on demand, with room for one model and for what sleeps."""
    models = [
        {"id": name, "model": str(path), "load": "on_demand", "device": device, "max_model_len": 2048,
         "max_num_seqs": 32}
        for name, path in folders.items()
    ]  # fmt: skip
    budget = 8_000_000_000 if device == "cpu" else 60_000_000_000
    return {
        "log_level": "WARNING", "memory_budget_bytes": budget, "host_budget_bytes": 60_000_000_000,
        "models": models,
    }  # fmt: skip


def measure(shape: str, device: str, rounds: int, folder: Path, console: Console) -> dict[str, Any]:
    """bfloat16 weights, then the same saved in 4 bits."""
    folders = {"bf16": folder / "bf16", SCHEME: folder / SCHEME}
    write_model(folders["bf16"], shape, device)
    quantize(folders["bf16"], folders[SCHEME], device)
    for path in folders.values():
        write_tokenizer(path, SHAPES[shape]["vocab_size"])
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()  # the worker needs it
    key = "admin-" + secrets.token_hex(16)
    server = WatchedServer(settings_of(folders, device), folder / "server", key)
    try:
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url(), headers=headers, timeout=300) as client:
            return {name: play(client, name, rounds, console) for name in folders}
    except Exception:
        console.print(server.output()[-3000:])
        raise
    finally:
        server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.shape, arguments.device, arguments.rounds, Path(folder), console)
    medians = {name: summary(rounds) for name, rounds in found.items()}
    record = {"shape": arguments.shape, "versions": versions(), "commit": arguments.commit,
              **accelerator_facts(arguments.device), "results": medians, "rounds": found}  # fmt: skip
    write_record(record, arguments.out)
    for name, figures in medians.items():
        console.print(name, {what: round(figure["median"], 3) for what, figure in figures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
