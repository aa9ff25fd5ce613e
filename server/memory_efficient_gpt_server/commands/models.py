"""`megpt models`: every model of a running server, loaded or not.

Purpose: the command's options and help.
Does not know: HTTP, how the table looks.
Invariant: it changes nothing on the server.
"""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import Commands, add_server_options, new_command

_EXAMPLES = """\
  megpt models                                          of the server on this machine
  megpt models --url http://gpu-box:8000 --admin-key-file admin.key
  megpt models --json | jq -r '.models[] | select(.state == "failed") | .reason'

The server must have a memory budget (memory_budget_bytes) and an admin key, which this command takes from the
variable MEGPT_ADMIN_KEY or from --admin-key-file. Each variant that requests may choose, or have chosen, has
a row of its own: demo[quantization=int4]. The columns:

  leases      requests that use the model now; it is not evicted while there are any
  waiting     requests that wait until it is loaded
  estimated   bytes that were computed before it was loaded ("-": it was never asked for)
  measured    bytes that it really took when it was last loaded ("-": it never was)
  last load   how long it took to become ready
  why         what it is doing, or why it failed
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "models", summary="list the models of a running server", examples=_EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client
    from memory_efficient_gpt_server.commands.model_table import show

    with admin_client(args) as client:
        show(client.models(), as_json=args.json, if_none="the server has no models")
    return 0
