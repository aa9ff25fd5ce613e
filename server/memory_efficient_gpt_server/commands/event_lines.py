"""Events of a server, from the lines of its stream to the lines that a person reads.

Purpose: parse server-sent events, and one line of text for each.
Does not know: HTTP, where lines go.
Invariant: an event of a kind that is not known here is shown as it came; no event is dropped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from memory_efficient_gpt_server.commands.tables import one_line, size


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event. `id`: to go on after it; None for those of the stream itself (`missed`, `end`)."""

    id: str | None
    kind: str
    facts: Mapping[str, Any]


def read_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """The events of a stream's lines. Comments and what is cut off at the end are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            yield ServerEvent(fields.get("id"), fields.get("event", "message"), _facts(fields["data"]))
        fields = {}


def _facts(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"data": data}


def line_of(event: ServerEvent) -> str:
    """The event as one line: the local time, and what happened."""
    told = _TELLERS.get(event.kind, _as_it_came)
    try:
        text = told(event.facts)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version than this command
        text = _as_it_came(event.facts)
    at = event.facts.get("time")
    clock = time.strftime("%H:%M:%S", time.localtime(at)) if isinstance(at, int | float) else "--:--:--"
    return f"{clock}  {one_line(event.kind):9}  {one_line(text)}"


def _as_it_came(facts: Mapping[str, Any]) -> str:
    return json.dumps(dict(facts))


def _state(facts: Mapping[str, Any]) -> str:
    return f"{facts['variant']}: {facts['from']} -> {facts['to']}{_because(facts['reason'])}"


def _load(facts: Mapping[str, Any]) -> str:
    ended = "loaded" if facts["result"] == "success" else "not loaded"
    return f"{facts['variant']}: {ended} after {facts['seconds']:.2f} s{_because(facts['reason'])}"


def _eviction(facts: Mapping[str, Any]) -> str:
    held = ", ".join(f"{size(n)} of {device}" for device, n in sorted(facts["held_bytes"].items()))
    way = "put to sleep" if facts["way"] == "sleep" else "unloaded"
    return f"{facts['variant']}: {way}{_because(facts['reason'])}; it holds {held or 'nothing'}"


def _refusal(facts: Mapping[str, Any]) -> str:
    count = facts["requests"]
    refused = f"{count} request{'s' * (count != 1)} refused"
    return f"{facts['variant']}: {refused}, {facts['code']}{_because(facts['reason'])}"


def _operation(facts: Mapping[str, Any]) -> str:
    error = facts["error"]
    why = "" if error is None else f": {error['message']}"
    return f"{facts['variant']}: {facts['what']} {facts['state']}, {facts['operation']}{why}"


def _kv(facts: Mapping[str, Any]) -> str:
    change, partner = facts["change_bytes"], facts["partner"]
    sign, word = ("+", "from") if change > 0 else ("-", "for")
    whose = "" if partner is None else f" {word} {partner}"
    return f"{facts['variant']}: {sign}{size(abs(change))} of KV memory{whose}, {size(facts['kv_bytes'])} now"


def _budget(facts: Mapping[str, Any]) -> str:
    return f"{facts['device']}: {size(facts['from_bytes'])} -> {size(facts['budget_bytes'])}"


def _model(facts: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in facts["settings"].items())
    return f"{facts['model']}: {facts['change']}" + (f", {settings}" if settings else "")


def _missed(facts: Mapping[str, Any]) -> str:
    count = "some" if facts["count"] is None else facts["count"]
    return f"{count} events are lost: {facts['reason']}"


def _end(facts: Mapping[str, Any]) -> str:
    return str(facts["reason"])


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


_TELLERS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = MappingProxyType(
    {
        "state": _state,
        "load": _load,
        "eviction": _eviction,
        "refusal": _refusal,
        "operation": _operation,
        "kv": _kv,
        "budget": _budget,
        "model": _model,
        "missed": _missed,
        "end": _end,
    }
)
