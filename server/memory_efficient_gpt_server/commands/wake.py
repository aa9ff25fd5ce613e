"""`megpt wake`: wake a sleeping model of a running server before anybody asks for it.

Purpose: the command's options and help.
Does not know: HTTP, who makes room for it.
Invariant: exit code 0 means ready, or with --no-wait that it is on its way.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    add_variant_options,
    new_command,
    variant_options,
)

_EXAMPLES = """\
  megpt wake writer                                     returns when it is ready
  megpt wake writer --no-wait                           returns at once; `megpt ps` shows how far it is
  megpt wake writer --url http://gpu-box:8000 --admin-key-file admin.key

A request for the model would wake it, too. If there is no room, idle models sleep or leave for it. One that
is not loaded is loaded by `megpt load`. Exit code: 0 ready (with --no-wait: begun), 1 refused.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "wake", summary="wake a sleeping model of a running server", examples=_EXAMPLES
    )
    parser.add_argument("model", metavar="ID", help="one of those that `megpt ps` lists")
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is ready"
    )
    add_variant_options(parser)
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Wake it, and say how it went."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client

    began_s = time.monotonic()
    with admin_client(args) as client:
        done, model = client.operate(args.model, "wake", {"wait": args.wait, **variant_options(args)})
    print(_said(done, model, time.monotonic() - began_s))
    return 0


def _said(done: bool, model: dict[str, Any], waited_s: float) -> str:
    from memory_efficient_gpt_server.commands.tables import one_line

    name, state = one_line(model["variant"]), one_line(model["state"])
    if not done:
        return f"{name}: {state}; `megpt ps` shows how far it is"
    wake_s, was_ready = model["last_wake_s"], model["state_age_s"] > waited_s
    return f"{name}: {state}" + ("" if wake_s is None or was_ready else f", woken in {wake_s:.2f} s")
