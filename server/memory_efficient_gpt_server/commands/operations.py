"""`megpt operations`: what administrators have asked of a running server, and calling one of it off.

Purpose: the command's options and help, the table, and one operation in full.
Does not know: HTTP, how a wish is fulfilled.
Invariant: it changes nothing on the server without --cancel.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any, Final

from memory_efficient_gpt_server.commands.options import Commands, add_server_options, new_command

_COLUMNS: Final = ("operation", "what", "model", "state", "began", "took", "why")
_TEXT_COLUMNS: Final = (0, 1, 2, 3, 4, 6)

_EXAMPLES = """\
  megpt operations                                      what goes on, and what has ended, the newest first
  megpt operations op-4be1c09a2f7d3381                  one of them, with its whole error
  megpt operations --cancel op-4be1c09a2f7d3381         calls it off
  megpt operations --json | jq -r '.operations[] | select(.state == "running") | .id'
  megpt operations --url http://gpu-box:8000 --admin-key-file admin.key

Loads, unloads, sleeps and wake-ups that administrators asked for, by this command line or by /admin, and the
loads of the server's own start. The last 256 that ended are kept. `megpt load ID --no-wait` is
followed here. The columns:

  what    load (with --no-evict: nobody leaves), unload (with its mode and deadline), sleep or wake
  state   running, done, cancelled, or failed
  began   this machine's time of day
  took    from its beginning to its end, or until now
  why     what it was refused with

A load that is called off is stopped unless others wait for the model, too; a drain ends and the model takes
requests again. What can't be stopped half-way is refused and goes on: falling asleep, a process that is being
ended. Exit code: 0 shown or called off, 1 refused.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "operations", summary="show or call off what administrators asked of a running server",
        examples=_EXAMPLES,
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("operation", metavar="ID", nargs="?", help="show this one (default: all)")
    which.add_argument("--cancel", metavar="ID", help="call this one off")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, or call off, and print."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client

    with admin_client(args) as client:
        if args.cancel is not None:
            found = client.cancel(args.cancel)
            text = f"{_name(found)} is {found['state']}"
        elif args.operation is not None:
            found = client.operation(args.operation)
            text = _in_full(found, time.time())
        else:
            found = client.operations()
            text = _table(found["operations"], time.time())
    print(json.dumps(found) if args.json else text)
    return 0


def _table(operations: list[dict[str, Any]], now_s: float) -> str:
    from memory_efficient_gpt_server.commands.tables import aligned

    if not operations:
        return "no administrator has asked for anything yet; `megpt load ID` loads a model"
    return "\n".join(aligned([_COLUMNS, *(_row(each, now_s) for each in operations)], _TEXT_COLUMNS))


def _row(operation: Mapping[str, Any], now_s: float) -> tuple[str, ...]:
    from memory_efficient_gpt_server.commands.tables import one_line

    return (
        one_line(operation["id"]),
        _what(operation),
        one_line(operation["variant"]),
        one_line(operation["state"]),
        time.strftime("%H:%M:%S", time.localtime(operation["began_at"])),
        f"{_seconds(operation, now_s):.1f} s",
        _why(operation),
    )


def _in_full(operation: Mapping[str, Any], now_s: float) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(operation["began_at"]))
    running = operation["state"] == "running"
    lines = [
        _name(operation),
        f"  {operation['state']} {'for' if running else 'after'} {_seconds(operation, now_s):.1f} s",
        f"  began {began}",
    ]
    if why := _why(operation):
        lines.append(f"  {why}")
    if running:
        lines.append(f"  `megpt operations --cancel {operation['id']}` calls it off")
    return "\n".join(lines)


def _name(operation: Mapping[str, Any]) -> str:
    from memory_efficient_gpt_server.commands.tables import one_line

    return one_line(f"{operation['id']}: {_what(operation)} of {operation['variant']}")


def _what(operation: Mapping[str, Any]) -> str:
    """With its options, as far as they say something."""
    from memory_efficient_gpt_server.commands.tables import one_line

    mode, deadline_s = operation["options"].get("mode"), operation["options"].get("deadline_s")
    told = [str(mode)] if mode not in (None, "drain") else []
    told += ["nobody leaves"] if operation["options"].get("evict") == "never" else []
    told += [f"within {deadline_s:g} s"] if deadline_s is not None else []
    return one_line(operation["what"] + (f" ({', '.join(told)})" if told else ""))


def _seconds(operation: Mapping[str, Any], now_s: float) -> float:
    """How long it took so far. The server's clock may be ahead of ours."""
    ended_s = now_s if operation["ended_at"] is None else operation["ended_at"]
    return float(max(0.0, ended_s - operation["began_at"]))


def _why(operation: Mapping[str, Any]) -> str:
    from memory_efficient_gpt_server.commands.tables import one_line

    error = operation["error"]
    return "" if error is None else one_line(f"{error['code']}: {error['message']}")
