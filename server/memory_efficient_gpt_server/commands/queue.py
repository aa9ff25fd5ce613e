"""`megpt queue`: who waits for which model of a running server, and why it is not loaded yet.

Purpose: the command's options and help, and the table.
Does not know: HTTP, how the queue is ordered.
Invariant: it changes nothing on the server; one line a model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, Final

from memory_efficient_gpt_server.commands.options import Commands, add_server_options, new_command

_COLUMNS: Final = ("#", "model", "state", "waiting", "waited", "missing", "ready in", "why")
_TEXT_COLUMNS: Final = (1, 2, 7)

_EXAMPLES = """\
  megpt queue                                           of the server on this machine
  megpt queue --url http://gpu-box:8000 --admin-key-file admin.key
  megpt queue --json | jq '.groups[].why.code'

Models are listed in the order in which they are loaded. The columns:

  waiting     requests, and administrators' loads, that wait for the model
  waited      how long the first of them has waited
  missing     bytes that are not free for it yet
  ready in    when it should be ready ("-": that depends on others' requests)
  why         what it waits for, and in whose favour or way
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "queue", summary="show who waits for which model of a running server", examples=_EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client

    with admin_client(args) as client:
        queue = client.queue()
    print(json.dumps(queue) if args.json else _shown(queue))
    return 0


def _shown(queue: Mapping[str, Any]) -> str:
    from memory_efficient_gpt_server.commands.tables import aligned

    groups, churn = queue["groups"], queue["churn"]
    lines = aligned([_COLUMNS, *map(_row, groups)], _TEXT_COLUMNS) if groups else ["nobody waits for a model"]
    held_back = f"; no more for {churn['wait_s']:.0f} s while models are in use" if churn["wait_s"] else ""
    swaps = f"{churn['swaps']} of {churn['most_swaps']} swaps within {churn['window_s']:g} s{held_back}"
    return "\n".join([*lines, "", swaps])


def _row(group: Mapping[str, Any]) -> tuple[str, ...]:
    from memory_efficient_gpt_server.commands.tables import UNKNOWN, one_line, size

    why = group["why"]
    missing, eta_s = sum(why["missing_bytes"].values()), why["eta_s"]
    others = [f"{name}: {', '.join(why[key])}" for name, key in _OTHERS if why.get(key)]
    return (
        str(group["position"]),
        one_line(group["variant"]),
        one_line(group["state"]),
        str(group["waiting"]),
        f"{group['waited_s']:.1f} s",
        size(missing) if missing else UNKNOWN,
        UNKNOWN if eta_s is None else f"{eta_s:.1f} s",
        one_line("; ".join([why["code"], *others])),
    )


_OTHERS: Final = (
    ("leaving", "evict"), ("going to sleep", "sleep"), ("in its way", "blocked_by"),
)  # fmt: skip
