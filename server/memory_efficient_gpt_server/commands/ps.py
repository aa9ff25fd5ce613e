"""`megpt ps`: the models of a running server that are loaded, on their way, or failed.

Purpose: the command's options and help.
Does not know: HTTP, how the table looks.
Invariant: it changes nothing on the server.
"""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import Commands, add_server_options, new_command

_EXAMPLES = """\
  megpt ps                                              what is loaded on the server of this machine
  megpt ps --url http://gpu-box:8000 --admin-key-file admin.key
  megpt ps --json | jq '[.models[].leases] | add'       requests under way

As `megpt models`, without the variants that are unloaded; `megpt models --help` explains the columns,
`megpt top` shows them live.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "ps", summary="list the loaded models of a running server", examples=_EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client
    from memory_efficient_gpt_server.commands.model_table import show
    from memory_efficient_gpt_server.commands.variant_rows import variant_rows

    with admin_client(args) as client:
        loaded = [model for model in client.models() if variant_rows(model, only_loaded=True)]
    none = "no model is loaded; `megpt load ID` loads one"
    show(loaded, as_json=args.json, if_none=none, only_loaded=True)
    return 0
