"""`megpt load`: load a model of a running server before anybody asks for it.

Purpose: the command's options and help, and what is said at its end.
Does not know: HTTP, what is evicted for it.
Invariant: exit code 0 means ready, or with --no-wait that the load is under way.
"""

from __future__ import annotations

import argparse
from typing import Any

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    add_variant_options,
    new_command,
    variant_options,
)

_EXAMPLES = """\
  megpt load writer                                     returns when it is ready
  megpt load writer --quantization int4                 a variant that its setting `variants` allows
  megpt load writer --no-wait                           returns at once; `megpt ps` shows how far it is
  megpt load writer --no-evict                          only if nobody must leave or sleep for it
  megpt load writer --url http://gpu-box:8000 --admin-key-file admin.key

If there is no room, idle models leave for it, the least recently used first; a model in use or pinned stays.
With --no-evict nobody leaves or sleeps, and the load is refused if somebody would have to; models may give KV
memory that they don't use.
The load goes on when this command is interrupted. Exit code: 0 ready (with --no-wait: begun), 1 not loaded.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "load", summary="load a model of a running server", examples=_EXAMPLES
    )  # fmt: skip
    parser.add_argument("model", metavar="ID", help="one of those that `megpt models` lists")
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is ready"
    )
    parser.add_argument(
        "--no-evict", action="store_true", help="refuse to load it if others must leave or sleep for it"
    )
    add_variant_options(parser)
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, and say how it went."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client

    with admin_client(args) as client:
        done, model = client.operate(args.model, "load", _body(args))
    print(_said(done, model))
    return 0


def _body(args: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {"wait": args.wait, **variant_options(args)}
    return body | {"evict": "never"} if args.no_evict else body


def _said(done: bool, model: dict[str, Any]) -> str:
    from memory_efficient_gpt_server.commands.model_table import bytes_cell
    from memory_efficient_gpt_server.commands.tables import one_line

    name, state = one_line(model["variant"]), one_line(model["state"])
    if not done:
        return f"{name}: {state}; `megpt ps` shows how far it is"
    load_s = model["last_load_s"]
    seconds = "" if load_s is None else f", loaded in {load_s:.1f} s"
    return f"{name}: {state}{seconds}, {bytes_cell(model['measured_bytes'])}"
