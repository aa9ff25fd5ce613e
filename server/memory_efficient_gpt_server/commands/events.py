"""`megpt events`: what happens to the models of a running server, as it happens.

Purpose: the command's options and help, and going on when the server was away.
Does not know: how a line reads.
Invariant: it changes nothing on the server; what was missed in between is told, never passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    new_command,
    positive_int,
)

if TYPE_CHECKING:
    from memory_efficient_gpt_server.commands.admin_client import AdminClient

RETRY_S: Final = 2.0

_EXAMPLES = """\
  megpt events                                          of the server on this machine; Ctrl-C ends it
  megpt events --url http://gpu-box:8000 --admin-key-file admin.key
  megpt events --json | jq -r 'select(.kind == "load" and .result == "success") | .seconds'
  megpt events --count 1                                waits for one event and ends

What is told:

  state       a model's state, from and to, and why
  load        a load has ended: after how many seconds, or why it failed
  eviction    a model leaves or is put to sleep (budget, overcommit, ttl, admin), and what it holds
  refusal     requests that waited for a model were refused
  operation   an administrator's load, unload, sleep or wake: running, done, failed, cancelled
  kv          a model got KV memory of others or gave some
  budget      a device has another memory budget
  model       a model was registered, removed, or its settings were changed
  missed      events that are lost, as they came too fast or the server was started anew

If the server goes away, it is asked again every two seconds, for what came after the last event.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "events", summary="tell what happens to the models of a running server", examples=_EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--count", type=positive_int, metavar="N", help="end after so many events")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tell events until interrupted, or `--count` of them."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client

    with admin_client(args) as client:
        follow(client, as_json=args.json, count=args.count)
    return 0


def follow(
    client: AdminClient, *, as_json: bool, count: int | None, pause: Callable[[float], None] = time.sleep
) -> None:
    """Print events. Raises ServerRefusedError if the first request is refused; later ones are tried again."""
    from memory_efficient_gpt_server.commands.admin_client import ServerRefusedError
    from memory_efficient_gpt_server.commands.event_lines import line_of

    last_id, told, was_there, trouble = None, 0, False, ""
    while True:
        try:
            for event in client.events(last_id):
                was_there, last_id, trouble = True, event.id or last_id, ""
                print(json.dumps(dict(event.facts)) if as_json else line_of(event), flush=True)
                told += event.id is not None
                if told == count:
                    return
        except ServerRefusedError as error:
            if not was_there:
                raise
            if str(error) != trouble:  # once for an outage, however long
                trouble = str(error)
                print(f"megpt: {trouble}", file=sys.stderr)
        was_there = True
        pause(RETRY_S)
