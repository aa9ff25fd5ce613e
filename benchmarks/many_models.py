"""`python -m benchmarks.many_models --minutes 10 --clients 64`: five models, memory for two, asked by chance.

Purpose: whether many clients of many models all get right and whole answers within the budget, and what
changing models costs: the same requests again, one model after the other.
Does not know: how models are chosen to be loaded; the server's internals.
Invariant: both orders have the same requests, the same number of clients and a fresh server each; every
answer is compared with what the model says alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from benchmarks.model_traffic import (
    TIMEOUT_S,
    Answer,
    Asked,
    References,
    by_chance,
    play,
    references,
    wrong,
)
from benchmarks.watched_server import WatchedServer

BUDGET_BYTES: Final = 280_000_000
MODELS: Final[tuple[dict[str, Any], ...]] = (
    {"id": "house", "model": "demo"},
    {"id": "house-int8", "model": "demo", "quantization": "int8"},
    {"id": "house-int4", "model": "demo", "quantization": "int4"},
    {"id": "writer-int8", "model": "demo-mha", "quantization": "int8"},
    {"id": "draft-int4", "model": "demo-draft", "quantization": "int4"},
)
"""Any two fit into the budget, no three do."""
POLL_S: Final = 0.5
AIM: Final = 0.8
MOST_LOG_LINES: Final = 100
_SAMPLE: Final = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


def settings_for(
    models: Sequence[dict[str, Any]] = MODELS, budget_bytes: int = BUDGET_BYTES
) -> dict[str, Any]:
    """The server's configuration."""
    common = {"load": "on_demand", "num_kv_blocks": 256, "num_threads": 1}
    return {
        "memory_budget_bytes": budget_bytes,
        "log_level": "WARNING",
        "models": [{**common, **model} for model in models],
    }


@dataclass
class Ledger:
    """What the server said of itself every POLL_S. activity: how often work was under way ("computing"), no
    work but a load or its end ("loading"), neither and somebody waited ("standing still"), or nothing."""

    budget_bytes: int = 0
    most_booked_bytes: int = 0
    activity: Counter[str] = field(default_factory=Counter)

    def take(self, memory: dict[str, Any], models: Sequence[dict[str, Any]]) -> None:
        """One reading."""
        for device in memory["devices"].values():
            self.budget_bytes = device["budget_bytes"]
            self.most_booked_bytes = max(self.most_booked_bytes, device["used_bytes"])
        states = {model["state"] for model in models}
        if any(model["leases"] for model in models):
            self.activity["computing"] += 1
        elif states & {"loading", "unloading", "draining"}:
            self.activity["loading"] += 1
        else:
            self.activity["standing still" if any(m["waiting"] for m in models) else "nothing"] += 1


@dataclass
class Run:
    """One order of requests on one server. seconds: until the last answer ended. log: warnings, errors."""

    answers: list[Answer]
    seconds: float
    ledger: Ledger
    metrics: dict[str, Any]
    server: WatchedServer
    shutdown: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def running(settings: dict[str, Any]) -> AsyncIterator[tuple[WatchedServer, httpx.AsyncClient]]:
    """A fresh server and a client of it. Its end is the caller's, who wants to know what is left; an
    exception ends it here."""
    key = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="many-models-") as folder:
        server = WatchedServer(settings, Path(folder), key)
        try:
            limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
            headers = {"authorization": f"Bearer {key}"}
            url = await asyncio.to_thread(server.url)
            async with httpx.AsyncClient(
                base_url=url, headers=headers, timeout=TIMEOUT_S, limits=limits
            ) as client:
                yield server, client
        finally:
            if server.process.poll() is None:
                await asyncio.to_thread(server.stop)


async def ask_alone(settings: dict[str, Any]) -> References:
    """What every model says when nobody else asks."""
    async with running(settings) as (_, client):
        return await references(client, [model["id"] for model in settings["models"]])


async def run_order(
    settings: dict[str, Any], sources: Callable[[], Sequence[Iterator[Asked]]], told: Callable[[Answer], None]
) -> Run:
    """All requests of the sources on a fresh server."""
    async with running(settings) as (server, client):
        return await watched(server, client, sources(), told)


async def watched(
    server: WatchedServer,
    client: httpx.AsyncClient,
    sources: Sequence[Iterator[Asked]],
    told: Callable[[Answer], None],
) -> Run:
    """All requests of the sources, watched from start to end; then the server is stopped."""
    answers: list[Answer] = []
    ledger = Ledger()

    def keep(answer: Answer) -> None:
        answers.append(answer)
        told(answer)

    poller = asyncio.create_task(_poll(client, ledger))
    started = time.monotonic()
    await play(client, sources, keep)
    seconds = time.monotonic() - started
    poller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await poller
    run = Run(answers, seconds, ledger, read_metrics((await client.get("/metrics")).text), server)
    run.shutdown = await asyncio.to_thread(server.stop)
    run.log = server.output().splitlines()[1:]  # the first one says where it serves
    return run


async def _poll(client: httpx.AsyncClient, ledger: Ledger) -> None:
    while True:
        memory = (await client.get("/admin/memory")).json()
        ledger.take(memory, (await client.get("/admin/models")).json()["models"])
        await asyncio.sleep(POLL_S)


def read_metrics(text: str) -> dict[str, Any]:
    """Loads, how long they took, and evictions by reason."""
    sums: defaultdict[str, float] = defaultdict(float)
    for name, labels, value in _SAMPLE.findall(text):
        if found := re.search(r'(?:result|reason)="(\w+)"', labels):
            sums[f"{name} {found[1]}"] += float(value)
        else:
            sums[name] += float(value)
    loads = sums["megpt_model_loads_total success"]
    return {
        "loads": int(loads),
        "loads_failed": int(sums["megpt_model_loads_total failure"]),
        "load_s_mean": sums["megpt_model_load_seconds_sum"] / loads if loads else None,
        "evictions": {
            reason: int(sums[f"megpt_model_evictions_total {reason}"])
            for reason in ("budget", "overcommit", "ttl", "admin")
        },
    }


def summary(run: Run, expected: References) -> dict[str, Any]:
    """The figures of one order."""
    whole = [a for a in run.answers if a.error is None]
    polls = max(1, run.ledger.activity.total())
    return {
        "requests": len(run.answers),
        "streams": sum(a.asked.stream for a in run.answers),
        "answered": len(whole),
        "wrong": wrong(run.answers, expected),
        "errors": dict(Counter(a.error for a in run.answers if a.error is not None)),
        "retried": dict(Counter(cause for a in run.answers for cause in a.retries)),
        "streams_cut": sum(a.error == "cut" for a in run.answers),
        "seconds": run.seconds,
        "requests_per_s": len(whole) / run.seconds,
        "tokens_per_s": sum(a.tokens for a in whole) / run.seconds,
        "first_token_s": percentiles([a.first_token_s for a in whole if a.first_token_s is not None]),
        "answer_s": percentiles([a.seconds for a in whole]),
        **run.metrics,
        "activity": {what: count / polls for what, count in run.ledger.activity.items()},
        "memory": memory_of(run),
        "shutdown": run.shutdown,
        "log": run.log[:MOST_LOG_LINES],
    }


def memory_of(run: Run) -> dict[str, Any]:
    """Booked by the server and measured from outside, against the budget."""
    budget = run.ledger.budget_bytes
    return {
        "budget_bytes": budget,
        "most_booked_bytes": run.ledger.most_booked_bytes,
        "most_of_workers": run.server.most,
        "compared": "private_bytes",
        "within_budget": max(run.ledger.most_booked_bytes, run.server.most["private_bytes"]) <= budget,
        "samples": run.server.samples,
        "longest_gap_s": run.server.longest_gap_s,
    }


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """The p-th is the least value that p percent don't exceed."""
    if not values_s:
        return {}
    ordered = sorted(values_s)
    at = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (50, 95, 99)}
    return {**at, "max": ordered[-1]}


async def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """References, requests by chance, and the same sorted by model."""
    settings = settings_for()
    ids = [model["id"] for model in settings["models"]]
    with progress_bar(console) as bar:
        task = bar.add_task("every model alone", total=None)
        expected = await ask_alone(settings)
        bar.remove_task(task)
        task = bar.add_task("by chance", total=None)

        def chosen() -> Sequence[Iterator[Asked]]:
            deadline_s = time.monotonic() + 60 * options.minutes
            return [by_chance(ids, f"{options.seed}-{n}", deadline_s) for n in range(options.clients)]

        mixed = await run_order(settings, chosen, lambda _: bar.advance(task))
        bar.update(task, total=len(mixed.answers))
        requests = sorted((a.asked for a in mixed.answers), key=lambda asked: ids.index(asked.model))
        shared = iter(requests)
        task = bar.add_task("sorted by model", total=len(requests))
        in_turn = await run_order(settings, lambda: [shared] * options.clients, lambda _: bar.advance(task))
    figures = {"by_chance": summary(mixed, expected), "sorted": summary(in_turn, expected)}
    ratios = {
        f"{rate}_ratio": figures["by_chance"][rate] / figures["sorted"][rate]
        for rate in ("requests_per_s", "tokens_per_s")
    }
    return {"settings": settings, "aim": AIM, **ratios, **figures}


def table(record: dict[str, Any]) -> str:
    """The report."""
    arms = record["by_chance"], record["sorted"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("requests (streams)", lambda a: f"{a['requests']:,} ({a['streams']:,})"),
        ("answered, wrong", lambda a: f"{a['answered']:,}, {len(a['wrong'])}"),
        ("streams cut", lambda a: str(a["streams_cut"])),
        ("errors", lambda a: json.dumps(a["errors"])),
        ("retried", lambda a: json.dumps(a["retried"])),
        ("loads, evictions", lambda a: f"{a['loads']}, {sum(a['evictions'].values())}"),
        ("first token p50/p95/p99/max, s", lambda a: _times(a["first_token_s"])),
        ("answer p50/p95/p99/max, s", lambda a: _times(a["answer_s"])),
        ("seconds", lambda a: f"{a['seconds']:.1f}"),
        ("requests/s, tokens/s", lambda a: f"{a['requests_per_s']:.1f}, {a['tokens_per_s']:,.0f}"),
        ("share of time", lambda a: ", ".join(f"{k} {v:.0%}" for k, v in sorted(a["activity"].items()))),
        ("booked / budget, MB", lambda a: _megabytes(a["memory"], a["memory"]["most_booked_bytes"])),
        (
            "private / budget, MB",
            lambda a: _megabytes(a["memory"], a["memory"]["most_of_workers"]["private_bytes"]),
        ),
        ("exit code, left behind", lambda a: f"{a['shutdown']['exit_code']}, {a['shutdown']['left_behind']}"),
    ]
    lines = ["| | by chance | sorted |", "|---|---:|---:|"]
    lines += [f"| {name} | {cell(arms[0])} | {cell(arms[1])} |" for name, cell in rows]
    return "\n".join([*lines, f"\nby chance / sorted: {record['requests_per_s_ratio']:.3f} (aim {AIM})"])


def _times(values_s: dict[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values_s.values())


def _megabytes(memory: dict[str, Any], size: int) -> str:
    return f"{size / 1e6:.1f} / {memory['budget_bytes'] / 1e6:.0f}"


def sound(figures: dict[str, Any]) -> bool:
    """Whether nothing went wrong; how fast it was does not count."""
    return (
        not figures["wrong"]
        and not figures["errors"]
        and figures["memory"]["within_budget"]
        and figures["shutdown"]["exit_code"] == 0
        and not figures["shutdown"]["left_behind"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print the table; 0 if all answers were right, whole and within budget."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of requests by chance (default: 10)")
    parser.add_argument("--clients", type=int, default=64, help="default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of models and prompts (default: 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "many_models.json")
    options = parser.parse_args(argv)
    facts = {
        "machine": machine_facts(usable_cpus()),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "clients": options.clients,
        "seed": options.seed,
    }
    record = {**facts, **asyncio.run(measure(options, Console(stderr=True)))}
    write_record(record, options.output)
    print(table(record))
    for answer in record["by_chance"]["wrong"] + record["sorted"]["wrong"]:
        print(answer)
    return 0 if sound(record["by_chance"]) and sound(record["sorted"]) else 1


if __name__ == "__main__":
    sys.exit(main())
