"""`make bench`: measure the project on this machine's CPU, and say which targets it meets.

Purpose: choose workloads, show progress, print one table, and keep every raw number in a JSON file.
Does not know: how anything is measured.
Invariant: a workload that fails is reported with its reason and fails the run; the others still run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from benchmarks.measuring import Conditions, Figure, Outcome, Workload
from benchmarks.workloads import bundled, generation, quantized, serving

WORKLOADS = (
    Workload("eight-clients", "Eight clients, 128 in / 64 out, 1.1B bf16", generation.eight_clients),
    Workload("one-client", "One client, 128 in / 64 out, 1.1B bf16", generation.one_client),
    Workload("quantized", "Int4 and int8 against bf16 and llama.cpp, 1.1B", quantized.quantized),
    Workload("server", "Server against its engine, 8 streams, demo", serving.server_and_engine),
    Workload("prefix", "A 1,500-token prompt seen before, demo", bundled.prompt_seen_before),
    Workload("small-pool", "200 requests on a tenth of their KV blocks, demo", bundled.small_pool),
    Workload("streams", "One stream and sixteen, demo", bundled.streams),
    Workload("worker-start", "A worker from the fork server, demo", serving.worker_start),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen workloads; 0 if none failed (a missed target is no failure)."""
    options = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    chosen = [w for w in WORKLOADS if not options.only or w.name in options.only]
    record = read_record(options.output)
    record["machine"] = machine_facts(options.threads)
    record["versions"] = versions()
    record["commit"] = commit()
    failures: dict[str, str] = {}
    table: list[tuple[Workload, list[Figure]]] = []
    console = Console(stderr=True)
    with progress_bar(console) as bar:
        overall = bar.add_task("all", total=len(chosen))
        for workload in chosen:
            bar.update(overall, description=workload.title)
            try:
                outcome = run_one(workload, options, bar)
            except (RuntimeError, OSError) as error:
                failures[workload.name] = str(error)
                console.print(f"[red]{workload.name} failed:[/red] {error}", markup=True)
            else:
                table.append((workload, outcome.figures))
                record["workloads"][workload.name] = recorded(workload, outcome, options)
                write_record(record, options.output)
            bar.advance(overall)
    print(markdown(table))
    for name, reason in failures.items():
        print(f"\n{name} failed: {reason}")
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=usable_cpus(), help="of each engine (default: all CPUs)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "memory_efficient_gpt" / "benchmarks",
        help="folder for the random 1.1B model, 4.4 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json", help="raw numbers"
    )
    return parser.parse_args(argv)


def run_one(workload: Workload, options: argparse.Namespace, bar: Progress) -> Outcome:
    """Run a workload with a line of its own in the display."""
    task = bar.add_task("", total=None)

    def advance(what: str) -> None:
        bar.update(task, description=f"  {workload.name}: {what}", advance=1)

    conditions = Conditions(
        cache=options.cache, threads=options.threads, repetitions=options.repetitions, advance=advance
    )
    try:
        advance("starting")
        return workload.run(conditions)
    finally:
        bar.remove_task(task)


def progress_bar(console: Console) -> Progress:
    """One line for all workloads and one for the running one."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def recorded(workload: Workload, outcome: Outcome, options: argparse.Namespace) -> dict[str, Any]:
    """A workload's part of the JSON file."""
    figures = [
        {**asdict(f), "target": str(f.target) if f.target else None, "verdict": f.verdict}
        for f in outcome.figures
    ]
    return {
        "title": workload.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "threads": options.threads,
        "repetitions": options.repetitions,
        "load_average": os.getloadavg(),
        "figures": figures,
        "facts": outcome.facts,
        "runs": {arm: [without_tokens(run) for run in runs] for arm, runs in outcome.runs.items()},
    }


def without_tokens(run: Any) -> dict[str, Any]:
    """A run without the token ids, which nobody compares later."""
    return {name: value for name, value in run.items() if name != "token_ids"}


def read_record(path: Path) -> dict[str, Any]:
    """The file as it is, so that --only replaces a part; an empty record if there is none."""
    if not path.is_file():
        return {"workloads": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def markdown(table: Sequence[tuple[Workload, list[Figure]]]) -> str:
    """The report."""
    lines = ["| Workload | Figure | Value | Target | | |", "|---|---|---:|---:|---|---|"]
    for workload, figures in table:
        for figure in figures:
            value = "not measured" if math.isnan(figure.value) else f"{figure.value:.3g} {figure.unit}"
            verdict = "" if math.isnan(figure.value) else figure.verdict
            cells = [workload.name, figure.name, value, figure.target or "", verdict, figure.note]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
