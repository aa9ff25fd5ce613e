"""What a person sees of `megpt quantize`: a line for each phase, a table of groups, what was written.

Purpose: progress on a terminal; results as a table, as plain text for pipes, as JSON for programs.
Does not know: how plans come about.
Invariant: progress goes to standard error and only to a terminal; results go to standard output.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from memory_efficient_gpt_server.commands.quantize_checks import Job

if TYPE_CHECKING:
    from memory_efficient_gpt.quantization.budget import MixedPlan
    from memory_efficient_gpt_server.commands.quantize_steps import Outcome, Progress

COLUMNS: Final = ("group", "scheme", "bits", "bytes", "t^2", "sensitivity", "predicted KL")
_LEFT: Final = 2
"""Columns of words; numbers follow."""
_NARROW: Final = {"sensitivity": "sensi-\ntivity", "predicted KL": "predicted\nKL"}


@contextmanager
def phase_bars() -> Iterator[Progress]:
    """A line with a bar for each phase; yields what moves them. Nothing off a terminal."""
    if not sys.stderr.isatty():
        yield lambda phase, what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text=" "), TextColumn("{task.fields[phase]:<12}"), BarColumn(),
        TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def finish() -> None:
            for task in tasks.values():
                if not bars.tasks[task].finished:
                    bars.update(task, completed=1.0, description="")

        def show_phase(phase: str, what: str, share: float) -> None:
            if phase not in tasks:
                finish()
                tasks[phase] = bars.add_task("", total=1.0, phase=phase)
            bars.update(tasks[phase], completed=min(share, 0.999), description=what)

        yield show_phase
        finish()


def show(job: Job, outcome: Outcome, *, as_json: bool) -> None:
    """Print the plan, or what was written."""
    if as_json:
        print(json.dumps(_as_json(job, outcome)))
        return
    if job.out is None and outcome.plan is not None:
        _print_table(outcome.plan)
    print(_summary(job, outcome))


def rows(plan: MixedPlan) -> list[tuple[str, ...]]:
    """The table's cells, one row for each group."""
    return [
        (
            measured.group.name, str(chosen.scheme), f"{chosen.bits / measured.group.num_weights:.3f}",
            f"{-(-chosen.bits // 8):,}", f"{chosen.error:.3g}",
            "-" if measured.per_error is None else f"{measured.per_error:.3g}", f"{chosen.divergence:.3g}",
        )
        for measured, chosen in zip(plan.groups, plan.chosen, strict=True)
    ]  # fmt: skip


def _print_table(plan: MixedPlan) -> None:
    cells = rows(plan)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    if sys.stdout.isatty():
        _print_rich_table(cells, sum(widths) + 2 * len(widths))
        return
    for row in (COLUMNS, *cells):
        padded = (
            cell.ljust(width) if number < _LEFT else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(padded))


def _print_rich_table(cells: list[tuple[str, ...]], width: int) -> None:
    """On a terminal narrower than `width`, names and headers take two lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    narrow = console.width < width
    table = Table(box=None, header_style="bold", padding=(0, 1 if narrow else 2, 0, 0))
    for number, name in enumerate(COLUMNS):
        left = number < _LEFT
        header = _NARROW.get(name, name) if narrow else name
        table.add_column(header, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for name, *others in cells:
        parent, _, own = name.rpartition(".")
        table.add_row(f"{parent}\n  {own}" if narrow and parent else name, *others)
    console.print(table)


def _summary(job: Job, outcome: Outcome) -> str:
    lines = [f"{outcome.bits_per_weight:.3f} bits per weight on average"]
    if outcome.plan is not None:
        divergence = outcome.plan.divergence
        lines.append(f"predicted KL divergence from the float model: {divergence:.4g} nats per token")
    if outcome.divergence is not None:
        lines.append(f"measured KL divergence from the float model: {outcome.divergence:.4g} nats per token")
    if outcome.measured_tokens:
        calibrated, measured = outcome.calibration_tokens, outcome.measured_tokens
        some = f"{measured:,} of " if measured < calibrated else ""
        lines.append(f"measured on {some}{calibrated:,} tokens of {_text_name(job)}, "
                     f"in {outcome.measured_in}")  # fmt: skip
        if not outcome.on_others:
            lines.append("weights were rounded with the same tokens, so on others it differs more: give a "
                         "longer text to know")  # fmt: skip
    before = f"{outcome.bytes_before:,} bytes"
    if outcome.rounded:
        ways = ", ".join(f"{how} ({_layers(count)})" for how, count in outcome.rounded.items())
        others = [f"{_layers(count)} not by gptq: {why}" for why, count in outcome.searched.items()]
        lines.append("; ".join((f"rounded by {ways}", *others)))
    elif job.rounding == "gptq":
        lines.append("predicted for codes found by search; gptq, by which --out rounds, loses less")
    if outcome.plan is not None and job.out is None:
        lines.append(f"these weights: {outcome.plan.num_bytes:,} bytes; the checkpoint now: {before}")
    if outcome.bytes_after is not None:
        saved = 1 - outcome.bytes_after / outcome.bytes_before
        lines += [
            f"{before} of weights became {outcome.bytes_after:,} bytes ({saved:.0%} saved)",
            f"serve it: megpt serve --model {shlex.quote(str(job.out))}",
        ]
    return "\n".join(lines)


def _as_json(job: Job, outcome: Outcome) -> dict[str, Any]:
    plan = outcome.plan
    return {
        "model": job.model,
        "out": None if job.out is None else str(job.out),
        "bits_per_weight": outcome.bits_per_weight,
        "bytes_before": outcome.bytes_before,
        "bytes_after": outcome.bytes_after,
        "measured_on": _text_name(job) if outcome.measured_tokens else None,
        "measured_tokens": outcome.measured_tokens,
        "calibration_tokens": outcome.calibration_tokens,
        "rounded": outcome.rounded,
        "not_as_asked": outcome.searched,
        "measured_on_other_texts": outcome.on_others if outcome.measured_tokens else None,
        "predicted_kl": None if plan is None else plan.divergence,
        "measured_kl": outcome.divergence,
        "schemes": {name: str(scheme) for name, scheme in outcome.schemes.items()},
        "groups": None if plan is None else _groups_as_json(plan),
    }


def _groups_as_json(plan: MixedPlan) -> list[dict[str, Any]]:
    return [
        {
            "group": measured.group.name,
            "layers": [layer.name for layer in measured.group.layers],
            "scheme": str(chosen.scheme),
            "bits_per_weight": chosen.bits / measured.group.num_weights,
            "bytes": -(-chosen.bits // 8),
            "error": chosen.error,
            "sensitivity": measured.per_error,
            "predicted_kl": chosen.divergence,
        }
        for measured, chosen in zip(plan.groups, plan.chosen, strict=True)
    ]


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _text_name(job: Job) -> str:
    return job.text_name or "a text the model wrote"
