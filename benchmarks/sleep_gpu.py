"""How long a whole 8B-shaped model on a GPU takes to sleep and to wake, beside loading it.

Purpose: seconds to sleep, to wake, to load; bytes on the device and the host meanwhile.
Does not know: servers, peers.
Invariant: weights are random, their files in the page cache; a wake counts as one only if the engine then
gives the same tokens as before.

    python -m benchmarks.sleep_gpu --out sleep.json              needs a CUDA device; about a minute
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.engine_gpu import SHAPES, load, quantize, write_model
from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams

ROUNDS = 3


def greedy(engine: Engine) -> list[int]:
    """A few tokens, which any wrong weight would change."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    engine.submit(Request(id="probe", prompt_token_ids=tuple(range(3, 200)), params=params))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tokens


def sleep_and_wake(engine: Engine, device: str) -> dict[str, Any]:
    """The figures of ROUNDS sleeps of one engine. Raises AssertionError if it is not itself afterwards."""
    expected = greedy(engine)
    sleeps_s: list[float] = []
    wakes_s: list[float] = []
    first_tokens_s: list[float] = []
    facts: dict[str, Any] = {}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        report = engine.sleep()
        sleeps_s.append(time.perf_counter() - began)
        facts = {
            "parked_bytes": report.parked_bytes,
            "pinned": report.pinned,
            "dropped_bytes": report.dropped_bytes,
        }
        if device != "cpu":
            facts |= {
                "allocated_asleep_bytes": torch.cuda.memory_allocated(),
                "reserved_asleep_bytes": torch.cuda.memory_reserved(),
            }
        began = time.perf_counter()
        engine.wake()
        wakes_s.append(time.perf_counter() - began)
        engine.submit(
            Request(
                id="first", prompt_token_ids=(3, 4, 5), params=SamplingParams(temperature=0.0, max_tokens=1)
            )
        )
        while engine.has_work:
            engine.step()
        first_tokens_s.append(time.perf_counter() - began)
        assert greedy(engine) == expected, "it computes something else after its sleep"
    return {
        **facts,
        "sleep_s": _rounded(sleeps_s), "wake_s": _rounded(wakes_s),
        "wake_to_token_s": _rounded(first_tokens_s),
        "sleep_s_median": round(statistics.median(sleeps_s), 4),
        "wake_s_median": round(statistics.median(wakes_s), 4),
        "wake_to_token_s_median": round(statistics.median(first_tokens_s), 4),
    }  # fmt: skip


def _rounded(seconds: list[float]) -> list[float]:
    return [round(s, 4) for s in seconds]


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def measure(shape: str, device: str, folder: Path, save: Any) -> None:
    """bfloat16 weights, then int4 ones; each is loaded twice, as the first load pays for imports."""
    plain, saved = folder / "bf16", folder / "int4-g128"
    write_model(plain, shape, device)
    _free(device)
    results: dict[str, Any] = {}
    for name, model in (("bf16", plain), ("int4-g128 saved", saved)):
        if model is saved:
            quantize(plain, saved, device)
            _free(device)
        loads_s = []
        for _ in range(2):
            engine, seconds = load(model, device, kv_cache_bytes=6 << 30 if device != "cpu" else 1 << 24)
            loads_s.append(round(seconds, 3))
            if len(loads_s) == 2:
                results[name] = {
                    "weights_bytes": engine.info.weights_bytes, "kv_cache_bytes": engine.info.kv_cache_bytes,
                    "load_s": loads_s, **sleep_and_wake(engine, device),
                }  # fmt: skip
            engine.close()
            del engine
            _free(device)
        Console().print(name, results[name])
        save(results)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()

    def save(results: dict[str, Any]) -> None:
        record = {"shape": arguments.shape, "versions": versions(), "commit": arguments.commit,
                  **accelerator_facts(arguments.device), "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.shape, arguments.device, Path(folder), save)


if __name__ == "__main__":
    main()
