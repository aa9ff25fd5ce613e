"""`python -m benchmarks.elastic_kv --repetitions 5`: bursts on one of two models, KV memory shared or split.

Purpose: tokens per second of a burst on one model while another one idles, with KV memory that wanders
between them and with the same memory split in halves, under the same budget.
Does not know: how memory is moved; HTTP: requests go to a server's registry and from there to its workers.
Invariant: both arms have the same budget, models, requests and number of clients, and take turns; their
workers run all the time, so that what one burst leaves behind is there in the next.

The KV cache is scarce: it limits how many sequences are computed together, and that is what more of it buys.

    python -m benchmarks.elastic_kv --ceiling                         how fast it could be at most
    python -m benchmarks.elastic_kv --device cuda --repetitions 2     both shapes, in turn; under four minutes
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
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.engine_gpu import write_model
from benchmarks.machine import ROOT, accelerator_facts, commit, machine_facts, usable_cpus, versions
from benchmarks.measuring import random_prompts
from benchmarks.watched_server import process_memory
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.settings import load_settings
from memory_efficient_gpt_server.worker_process import start_fork_server

TARGET: Final = 1.6
MODELS: Final = ("left", "right")
POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two models of one kind on a device, and what is asked of them.

    model: a bundled one, or a shape of engine_gpu.py, with random weights. context_bytes: what one keeps at
    least, a request of full length; kv_bytes: of both together. clients at once, requests: of a burst.
    """

    model: str
    device: str
    context_bytes: int
    kv_bytes: int
    max_len: int
    prompt_tokens: int
    output_tokens: int
    clients: int
    requests: int
    max_num_seqs: int = 64
    vocabulary: int = 4096


_GRANULES: Final = {"demo": 12 * (2 << 20), "llama1b": 32 * (2 << 20)}
"""On a GPU KV memory moves by 2 MiB in each tensor: 256 blocks of 64 tokens of demo, 32 of llama1b."""

CPU: Final = Case(
    model="demo", device="cpu", max_len=128, prompt_tokens=16, output_tokens=112, clients=64, requests=128,
    context_bytes=9 * 24_576, kv_bytes=90 * 24_576,
)  # fmt: skip
CUDA: Final = {
    "demo": Case(
        model="demo", device="cuda:0", max_len=1024, prompt_tokens=128, output_tokens=896, clients=256,
        requests=320, max_num_seqs=256, context_bytes=_GRANULES["demo"], kv_bytes=10 * _GRANULES["demo"],
    ),
    "llama1b": Case(
        model="llama1b", device="cuda:0", max_len=512, prompt_tokens=128, output_tokens=384, clients=128,
        requests=192, max_num_seqs=128, context_bytes=_GRANULES["llama1b"],
        kv_bytes=20 * _GRANULES["llama1b"], vocabulary=128_256,
    ),
}  # fmt: skip


def settings_for(case: Case, arm: str, budget_bytes: int, folder: Path | None = None) -> dict[str, Any]:
    """A server's configuration. folder: of the model, if it is not bundled."""
    kept = case.context_bytes
    limits = {
        "split": {"kv_cache_bytes": case.kv_bytes // 2},
        "elastic": {"kv_soft_limit_bytes": kept, "kv_hard_limit_bytes": case.kv_bytes - kept},
        "ceiling": {"kv_cache_bytes": case.kv_bytes - kept},
    }[arm]
    common = {
        "model": case.model if folder is None else str(folder), "device": case.device, "num_threads": 1,
        "max_model_len": case.max_len, "max_num_seqs": case.max_num_seqs, "load": "on_demand",
    }  # fmt: skip
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


async def budget_for_both(case: Case, folder: Path | None) -> int:
    """Bytes in which both models have `kv_bytes` for their caches, and not more."""
    async with hosting(settings_for(case, "split", 1 << 40, folder)) as registry:
        sizes = {str(kind): size for kind, size in (await registry.plan(MODELS[0])).bytes.items()}
    each = sum(sizes.get(kind, 0) for kind in ("weights", "workspace", "context"))
    return case.kv_bytes + len(MODELS) * each


@dataclass
class Arm:
    """A registry, and the most that was seen of it: booked bytes, those of KV caches, and its workers'."""

    registry: Registry
    case: Case
    bursts: list[dict[str, Any]] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    async def watch(self) -> None:
        """Look at its books and its workers until cancelled."""
        while True:
            ledger = self.registry.state.ledger
            keys = [self.registry.models[model].key for model in MODELS]
            seen = {
                "booked": ledger.used[self.case.device],
                "kv_booked": sum(kv_bytes(ledger, key) for key in keys),
            }
            for model in MODELS:
                if (pid := self.registry.pid(model)) is not None:
                    for name, size in process_memory(pid).items():
                        seen[f"workers_{name}"] = seen.get(f"workers_{name}", 0) + size
            self.most = {name: max(size, self.most.get(name, 0)) for name, size in seen.items()}
            self.samples += 1
            await asyncio.sleep(POLL_S)


_IDS = itertools.count()


async def burst(arm: Arm, model: str, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Many clients at once, each asking one request after the other. Raises MegptError if one fails."""
    left = iter(prompts)
    greedy = SamplingParams(temperature=0.0, max_tokens=arm.case.output_tokens, ignore_eos=True)

    async def one() -> int:
        tokens = 0
        for prompt in left:
            async with arm.registry.lease(model) as engine:
                asked = Request(id=f"r{next(_IDS)}", prompt_token_ids=tuple(prompt), params=greedy)
                async for event in engine.submit(asked):
                    if event.error is not None:
                        raise event.error
                    tokens += len(event.token_ids)
        return tokens

    async with arm.registry.lease(model):  # its load is no part of the first burst
        pid = arm.registry.pid(model)
    began_cpu_s, started = cpu_seconds(pid), time.perf_counter()
    tokens = sum(await asyncio.gather(*(one() for _ in range(arm.case.clients))))
    seconds = time.perf_counter() - started
    return {
        "model": model, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / (cpu_seconds(pid) - began_cpu_s),
    }  # fmt: skip


def cpu_seconds(pid: int | None) -> float:
    """Processor time that a process has used, which other work on the machine changes little."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    case: Case, repetitions: int, console: Console, folder: Path | None = None, *, ceiling: bool = False
) -> dict[str, Any]:
    """Bursts on each model of each arm in turn; the first round is dropped. folder: as for `settings_for`.

    ceiling: with a third arm that has, beyond the budget, always what the elastic one can come to.
    """
    start_fork_server()
    budget_bytes = await budget_for_both(case, folder)
    budgets = {"split": budget_bytes, "elastic": budget_bytes}
    if ceiling:
        budgets["ceiling"] = budget_bytes + case.kv_bytes
    async with contextlib.AsyncExitStack() as stack:
        arms: dict[str, Arm] = {}
        for name, size in budgets.items():
            settings = settings_for(case, name, size, folder)
            arms[name] = Arm(await stack.enter_async_context(hosting(settings)), case)
        with progress_bar(console) as bar:
            task = bar.add_task("bursts", total=(repetitions + 1) * len(arms) * len(MODELS))
            for repetition in range(-1, repetitions):
                for number, model in enumerate(MODELS):
                    prompts = random_prompts(
                        2 * repetition + number, case.requests, case.prompt_tokens, case.vocabulary
                    )
                    for name in sorted(arms, reverse=(repetition + number) % 2 == 0):
                        bar.update(task, description=f"{model}, {name}", advance=1)
                        await _one_burst(arms[name], model, prompts, keep=repetition >= 0)
        figures = {name: _figures(arm, budgets[name]) for name, arm in arms.items()}
    found = {"": "elastic"} | ({"ceiling_": "ceiling"} if ceiling else {})
    return {
        "target": TARGET,
        "case": asdict(case),
        **{f"{prefix}ratios": _ratios(figures, arm, "tokens_per_s") for prefix, arm in found.items()},
        **{f"{prefix}cpu_ratios": _ratios(figures, arm, "tokens_per_cpu_s") for prefix, arm in found.items()},
        "settings": {name: settings_for(case, name, size, folder) for name, size in budgets.items()},
        **figures,
    }


def _ratios(figures: dict[str, Any], arm: str, rate: str) -> dict[str, float]:
    return {model: figures[arm][rate][model] / figures["split"][rate][model] for model in MODELS}


async def _one_burst(arm: Arm, model: str, prompts: Sequence[Sequence[int]], *, keep: bool) -> None:
    watching = asyncio.create_task(arm.watch())
    result = await burst(arm, model, prompts)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    if keep:
        arm.bursts.append(result)


def _figures(arm: Arm, budget_bytes: int) -> dict[str, Any]:
    tally = arm.registry.tally
    compared = ["booked"] if arm.case.device != "cpu" else ["booked", "workers_private_bytes"]
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
            "compared": compared,
            "kv_bytes": arm.case.kv_bytes,
            "within_budget": max(arm.most[name] for name in compared) <= budget_bytes,
            "samples": arm.samples,
        },
    }


def table(record: dict[str, Any]) -> str:
    """The report."""
    names = [name for name in ("split", "elastic", "ceiling") if name in record]
    lines = [f"| | {' | '.join(names)} |", f"|---{'|---:' * len(names)}|"]
    arms = [record[name] for name in names]
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
            *([f"ceiling / split: {json.dumps(record['ceiling_ratios'])}"] if "ceiling" in record else []),
        ]
    )


def sound(figures: dict[str, Any]) -> bool:
    """Whether it stayed within the budget and loaded nothing twice; how fast it was does not count."""
    memory = figures["memory"]
    kept = bool(memory["within_budget"]) and memory["most_bytes"]["kv_booked"] <= memory["kv_bytes"]
    return kept and figures["loads"] == len(MODELS) and figures["evictions"] == 0


def on_gpu(cases: dict[str, Case], repetitions: int, console: Console, *, ceiling: bool) -> dict[str, Any]:
    """The records of shapes, by name, and the device's facts."""
    records: dict[str, Any] = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = None
            if name != "demo":
                folder = Path(scratch)
                write_model(folder, name, "cpu")
            records[name] = asyncio.run(measure(case, repetitions, console, folder, ceiling=ceiling))
    return {**accelerator_facts("cuda"), "shapes": records}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print the table; 0 if both arms kept to the budget and reloaded nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic_kv", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=tuple(CUDA), default=tuple(CUDA), help="on a GPU")
    parser.add_argument("--repetitions", type=int, default=5, help="of every burst (default: 5)")
    parser.add_argument("--clients", type=int, help="at once (default: the case's)")
    parser.add_argument("--requests", type=int, help="of a burst (default: the case's)")
    parser.add_argument("--ceiling", action="store_true", help="measure what more memory would give, too")
    parser.add_argument("--output", type=Path, help="default: elastic_kv.json or elastic_kv_h200.json there")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    facts = {
        "machine": machine_facts(usable_cpus()),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "repetitions": options.repetitions,
    }
    wanted = {"clients": options.clients, "requests": options.requests}
    sizes = {name: value for name, value in wanted.items() if value is not None}
    if options.device == "cuda":
        cases = {name: replace(CUDA[name], **sizes) for name in options.shapes}
        found = on_gpu(cases, options.repetitions, console, ceiling=options.ceiling)
        records = found["shapes"]
    else:
        case = replace(CPU, **sizes)
        found = asyncio.run(measure(case, options.repetitions, console, ceiling=options.ceiling))
        records = {"demo": found}
    name = "elastic_kv.json" if options.device == "cpu" else "elastic_kv_h200.json"
    write_record({**facts, **found}, options.output or ROOT / "benchmarks" / "results" / name)
    for shape, record in records.items():
        print(f"{shape} on {options.device}\n\n{table(record)}\n")
    return 0 if all(sound(record[arm]) for record in records.values() for arm in ("split", "elastic")) else 1


if __name__ == "__main__":
    sys.exit(main())
