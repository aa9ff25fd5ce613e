"""`python -m benchmarks.elastic_kv --repetitions 5`: bursts on one of two models, KV memory shared or split.

Purpose: tokens per second of a burst on one model while another one idles, with KV memory that wanders
between them and with the same memory split in halves, under the same budget.
Does not know: how memory is moved; HTTP: requests go to a server's registry and from there to its workers.
Invariant: both arms have the same budget, models, requests and number of clients, and take turns; their
workers run all the time, so that what one burst leaves behind is there in the next.

The KV cache is scarce: it limits how many sequences are computed together, and that is what more of it buys.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from benchmarks.measuring import random_prompts
from benchmarks.watched_server import process_memory
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.settings import load_settings
from memory_efficient_gpt_server.worker_process import start_fork_server

TARGET: Final = 1.6
BLOCK_BYTES: Final = 24_576
"""Of the demo model: 6 layers, 16 tokens, 2 heads of 32, bfloat16, keys and values."""
MAX_LEN: Final = 128
CONTEXT_BYTES: Final = (MAX_LEN // 16 + 1) * BLOCK_BYTES
"""What a model keeps at least: one request of full length."""
KV_BYTES: Final = 10 * CONTEXT_BYTES
"""Of both models together."""
PROMPT_TOKENS: Final = 16
OUTPUT_TOKENS: Final = 112
MODELS: Final = ("left", "right")
POLL_S: Final = 0.5
VOCABULARY: Final = 4096


def settings_for(arm: str, budget_bytes: int) -> dict[str, Any]:
    """A server's configuration."""
    half = KV_BYTES // 2
    limits = {
        "split": {"kv_cache_bytes": half},
        "elastic": {"kv_soft_limit_bytes": CONTEXT_BYTES, "kv_hard_limit_bytes": KV_BYTES - CONTEXT_BYTES},
    }[arm]
    common = {"model": "demo", "max_model_len": MAX_LEN, "num_threads": 1, "load": "on_demand"}
    return {
        "memory_budget_bytes": budget_bytes,
        "models": [{"id": name, **common, **limits} for name in MODELS],
    }


@contextlib.asynccontextmanager
async def hosting(settings: dict[str, Any]) -> AsyncIterator[Registry]:
    """A server's registry at work, without the server."""
    catalog = build_catalog(
        load_settings(settings, {}).settings, worker_log_level="WARNING", worker_log_json=False
    )
    assert isinstance(catalog.registry, Registry)
    catalog.registry.start()
    try:
        yield catalog.registry
    finally:
        await catalog.registry.close()


async def budget_for_both() -> int:
    """Bytes in which both models have KV_BYTES for their caches, and not more."""
    async with hosting(settings_for("split", 1 << 40)) as registry:
        sizes = {str(kind): size for kind, size in (await registry.plan(MODELS[0])).bytes.items()}
    return KV_BYTES + len(MODELS) * (sizes["weights"] + sizes["workspace"])


@dataclass
class Arm:
    """A registry, and the most that was seen of it: booked bytes, those of KV caches, and its workers'."""

    registry: Registry
    bursts: list[dict[str, Any]] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    async def watch(self) -> None:
        """Look at its books and its workers until cancelled."""
        while True:
            ledger = self.registry.state.ledger
            keys = [self.registry.models[model].key for model in MODELS]
            seen = {"booked": ledger.used["cpu"], "kv_booked": sum(kv_bytes(ledger, key) for key in keys)}
            for model in MODELS:
                if (pid := self.registry.pid(model)) is not None:
                    for name, size in process_memory(pid).items():
                        seen[f"workers_{name}"] = seen.get(f"workers_{name}", 0) + size
            self.most = {name: max(size, self.most.get(name, 0)) for name, size in seen.items()}
            self.samples += 1
            await asyncio.sleep(POLL_S)


_IDS = itertools.count()
GREEDY: Final = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


async def burst(arm: Arm, model: str, prompts: Sequence[Sequence[int]], clients: int) -> dict[str, Any]:
    """Many clients at once, each asking one request after the other. Raises MegptError if one fails."""
    left = iter(prompts)

    async def one() -> int:
        tokens = 0
        for prompt in left:
            async with arm.registry.lease(model) as engine:
                asked = Request(id=f"r{next(_IDS)}", prompt_token_ids=tuple(prompt), params=GREEDY)
                async for event in engine.submit(asked):
                    if event.error is not None:
                        raise event.error
                    tokens += len(event.token_ids)
        return tokens

    async with arm.registry.lease(model):  # its load is no part of the first burst
        pid = arm.registry.pid(model)
    began_cpu_s, started = cpu_seconds(pid), time.perf_counter()
    tokens = sum(await asyncio.gather(*(one() for _ in range(clients))))
    seconds = time.perf_counter() - started
    return {
        "model": model, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / (cpu_seconds(pid) - began_cpu_s),
    }  # fmt: skip


def cpu_seconds(pid: int | None) -> float:
    """Processor time that a process has used, which other work on the machine changes little."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


async def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Bursts on each model of each arm in turn; the first round is dropped."""
    start_fork_server()
    budget_bytes = await budget_for_both()
    async with contextlib.AsyncExitStack() as stack:
        arms: dict[str, Arm] = {}
        for name in ("split", "elastic"):
            arms[name] = Arm(await stack.enter_async_context(hosting(settings_for(name, budget_bytes))))
        with progress_bar(console) as bar:
            task = bar.add_task("bursts", total=(options.repetitions + 1) * 2 * len(MODELS))
            for repetition in range(-1, options.repetitions):
                for number, model in enumerate(MODELS):
                    prompts = random_prompts(
                        2 * repetition + number, options.requests, PROMPT_TOKENS, VOCABULARY
                    )
                    for name in sorted(arms, reverse=(repetition + number) % 2 == 0):
                        bar.update(task, description=f"{model}, {name}", advance=1)
                        await _one_burst(arms[name], model, prompts, options.clients, keep=repetition >= 0)
        figures = {name: _figures(arm, budget_bytes) for name, arm in arms.items()}
    ratios, cpu_ratios = (
        {model: figures["elastic"][rate][model] / figures["split"][rate][model] for model in MODELS}
        for rate in ("tokens_per_s", "tokens_per_cpu_s")
    )
    settings = {name: settings_for(name, budget_bytes) for name in arms}
    return {
        "target": TARGET,
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "settings": settings,
        **figures,
    }


async def _one_burst(
    arm: Arm, model: str, prompts: Sequence[Sequence[int]], clients: int, *, keep: bool
) -> None:
    watching = asyncio.create_task(arm.watch())
    result = await burst(arm, model, prompts, clients)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    if keep:
        arm.bursts.append(result)


def _figures(arm: Arm, budget_bytes: int) -> dict[str, Any]:
    tally = arm.registry.tally
    return {
        **{
            rate: {
                model: statistics.median(b[rate] for b in arm.bursts if b["model"] == model)
                for model in MODELS
            }
            for rate in ("tokens_per_s", "tokens_per_cpu_s")
        },
        "bursts": arm.bursts,
        "loads": sum(tally.loads.values()),
        "evictions": sum(tally.unloads.values()),
        "memory": {
            "budget_bytes": budget_bytes,
            "most_bytes": arm.most,
            "compared": ["booked", "workers_private_bytes"],
            "within_budget": max(arm.most["booked"], arm.most["workers_private_bytes"]) <= budget_bytes,
            "samples": arm.samples,
        },
    }


def table(record: dict[str, Any]) -> str:
    """The report."""
    lines = ["| | split | elastic |", "|---|---:|---:|"]
    arms = record["split"], record["elastic"]
    for model, rate in itertools.product(MODELS, ("tokens_per_s", "tokens_per_cpu_s")):
        cells = [f"{arm[rate][model]:,.0f}" for arm in arms]
        lines.append(f"| {rate}, burst on {model} | {' | '.join(cells)} |")
    for name in ("booked", "kv_booked", "workers_private_bytes"):
        cells = [f"{arm['memory']['most_bytes'][name]:,}" for arm in arms]
        lines.append(f"| most bytes: {name} | {' | '.join(cells)} |")
    lines.append(f"| loads | {' | '.join(str(arm['loads']) for arm in arms)} |")
    return "\n".join(
        [
            *lines,
            f"\nelastic / split: {json.dumps(record['ratios'])} (target {TARGET}), "
            f"by processor time {json.dumps(record['cpu_ratios'])}",
        ]
    )


def sound(figures: dict[str, Any]) -> bool:
    """Whether it stayed within the budget and loaded nothing twice; how fast it was does not count."""
    memory = figures["memory"]
    kept = bool(memory["within_budget"]) and memory["most_bytes"]["kv_booked"] <= KV_BYTES
    return kept and figures["loads"] == len(MODELS) and figures["evictions"] == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print the table; 0 if both arms kept to the budget and reloaded nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic_kv", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of every burst (default: 5)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--requests", type=int, default=128, help="of a burst (default: 128)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "elastic_kv.json")
    options = parser.parse_args(argv)
    facts = {
        "machine": machine_facts(usable_cpus()),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "repetitions": options.repetitions,
        "clients": options.clients,
        "requests": options.requests,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    record = {**facts, **asyncio.run(measure(options, Console(stderr=True)))}
    write_record(record, options.output)
    print(table(record))
    return 0 if sound(record["split"]) and sound(record["elastic"]) else 1


if __name__ == "__main__":
    sys.exit(main())
