"""`python -m benchmarks.sleep_cpu --rounds 20`: to the first token of a model that sleeps, on a CPU.

Purpose: what a sleeping model costs its first client, beside one that must be loaded and one that is ready;
what its worker has in memory awake and asleep.
Does not know: the server's internals; it asks over HTTP and looks into /proc.
Invariant: every round has each of the three once; a first token counts only if the whole answer is the one
that the model gave before.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from benchmarks.watched_server import WatchedServer

BLOCKS: Final = 30_000
BUDGET_BYTES: Final = 4_000_000_000
PROMPT: Final = "The old house at the end of the lane"
FILLING: Final = 64
"""Requests of different prompts before each sleep, so that there is a cache to give back."""


def first_token(client: httpx.Client, model: str, prompt: str = PROMPT) -> tuple[float, str]:
    """Seconds from the request to its first token, and the whole text."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, seconds = "", 0.0
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                seconds = seconds or time.perf_counter() - began
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return seconds, text


def operate(client: httpx.Client, model: str, what: str) -> float:
    """Seconds of an administrator's operation, waited for."""
    began = time.perf_counter()
    client.post(f"/admin/models/{model}/{what}", json={"wait": True}).raise_for_status()
    return time.perf_counter() - began


def fill(client: httpx.Client, model: str) -> None:
    """Use some of the KV cache."""
    for number in range(FILLING):
        prompt = f"{number} " + "and then the next one came along the road " * 20
        answer = client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 1})
        answer.raise_for_status()


def resident(client: httpx.Client, model: str) -> int:
    """What its worker has in RAM, pages shared with others included."""
    found: int = client.get(f"/admin/models/{model}").json()["process_rss_bytes"]
    return found


def play(client: httpx.Client, model: str, rounds: int, console: Console) -> dict[str, list[float]]:
    """All rounds. Raises RuntimeError if an answer differs."""
    _, expected = first_token(client, model)
    found: dict[str, list[float]] = {
        name: []
        for name in (
            "sleep_s",
            "asleep_s",
            "unload_s",
            "unloaded_s",
            "swap_s",
            "ready_s",
            "awake_bytes",
            "asleep_bytes",
        )
    }

    def ask(name: str) -> None:
        seconds, text = first_token(client, model)
        if text != expected:
            raise RuntimeError(f"the answer differs ({name}): {text!r}, expected {expected!r}")
        found[name].append(seconds)

    with progress_bar(console) as bar:
        for _ in bar.track(range(rounds), description="rounds"):
            found["unload_s"].append(operate(client, model, "unload"))
            ask("unloaded_s")
            found["swap_s"].append(found["unload_s"][-1] + found["unloaded_s"][-1])
            fill(client, model)
            ask("ready_s")
            found["awake_bytes"].append(resident(client, model))
            found["sleep_s"].append(operate(client, model, "sleep"))
            found["asleep_bytes"].append(resident(client, model))
            ask("asleep_s")
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Median, least and greatest of each."""
    return {
        name: {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name, values in found.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sleep_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--quantization", help="a scheme such as int4 (default: none)")
    parser.add_argument("--threads", type=int, default=1, help="of the model (default: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sleep_cpu.json")
    options = parser.parse_args(argv)
    console, key = Console(stderr=True), "admin-" + secrets.token_hex(16)
    settings = {
        "memory_budget_bytes": BUDGET_BYTES, "log_level": "WARNING",
        "models": [{"id": "m", "model": options.model, "load": "on_demand", "device": "cpu",
                    "num_kv_blocks": BLOCKS, "num_threads": options.threads,
                    "quantization": options.quantization}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        server = WatchedServer(settings, Path(folder), key)
        try:
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=server.url(), headers=headers, timeout=120) as client:
                found = play(client, "m", options.rounds, console)
        finally:
            server.stop()
    record = {
        "machine": machine_facts(usable_cpus()), "versions": versions(), "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model,
        "quantization": options.quantization, "threads": options.threads, "kv_blocks": BLOCKS,
        **summary(found), "rounds": found,
    }  # fmt: skip
    write_record(record, options.output)
    console.print_json(data=summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
