"""How `megpt top` looks.

Purpose: one frame for the terminal from one or two readings.
Does not know: where readings come from, when the next one comes.
Invariant: text of the server is shown as it is, never read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memory_efficient_gpt_server.commands.tables import UNKNOWN, one_line, size
from memory_efficient_gpt_server.commands.top_readings import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    Reading,
    per_second,
)

_BAR_CELLS: Final = 30
_STATE_STYLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ready": "green",
        "failed": "bold red",
        "unloaded": "dim",
        "queued": "yellow",
        "loading": "yellow",
        "asleep": "blue",
    }
)
_OTHER_STATE: Final = "cyan"
_NUMBERS: Final = ("leases", "waiting", "memory", "prompt tok/s", "output tok/s")


def frame(url: str, before: Reading | None, now: Reading, trouble: str | None = None) -> RenderableType:
    """Everything. before: the reading that rates are measured from. trouble: why `now` is an old one."""
    parts: list[RenderableType] = [Text(f"megpt top  {one_line(url)}", style="bold")]
    parts += [_device_line(name, device) for name, device in sorted(now.devices.items())]
    parts += [_events_line(now), Text(), _table(before, now)]
    if trouble is not None:
        parts.append(Text(one_line(trouble), style="bold red"))
    return Group(*parts)


def _device_line(name: str, device: Mapping[str, int]) -> Text:
    used, budget = device["used_bytes"], device["budget_bytes"]
    share = used / budget if budget else 0.0
    filled = min(_BAR_CELLS, round(share * _BAR_CELLS))
    line = Text(f"{name:8} [")
    line.append("#" * filled, style="red" if share > 1 else "green")
    line.append("." * (_BAR_CELLS - filled), style="dim")
    line.append(f"] {size(used)} of {size(budget)} ({share:.0%})")
    if device["freeing_bytes"]:
        line.append(f", {size(device['freeing_bytes'])} being freed")
    if device["leaked_bytes"]:
        line.append(f", {size(device['leaked_bytes'])} leaked", style="red")
    return line


def _events_line(now: Reading) -> Text:
    counted = sorted((reason, count) for reason, count in now.evictions.items() if count)
    by_reason = ", ".join(f"{one_line(reason)} {count:.0f}" for reason, count in counted)
    evictions = f"{sum(now.evictions.values()):.0f}" + (f" ({by_reason})" if by_reason else "")
    return Text(f"evictions {evictions}   waiting {now.waiting}")


def _table(before: Reading | None, now: Reading) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", no_wrap=True, overflow="ellipsis")
    for model in now.models:
        table.add_row(*_row(model, before, now))
    return table


def _row(model: Mapping[str, Any], before: Reading | None, now: Reading) -> list[Text]:
    state = one_line(model["state"])
    rates = [_rate(per_second(before, now, name, model["id"])) for name in (PROMPT_TOKENS, GENERATED_TOKENS)]
    held = now.held_bytes.get(model["id"])
    memory = UNKNOWN if held is None else size(int(held))
    cells = [str(model["leases"]), str(model["waiting"]), memory, *rates]
    return [
        Text(one_line(model["id"])),
        Text(state, style=_STATE_STYLES.get(state, _OTHER_STATE)),
        *map(Text, cells),
        Text(one_line(model["reason"] or "")),
    ]


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.1f}"
