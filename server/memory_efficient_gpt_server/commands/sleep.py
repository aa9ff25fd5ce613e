"""`megpt sleep`: let a model of a running server give memory back without leaving.

Purpose: the command's options and help.
Does not know: HTTP, what a model gives back.
Invariant: exit code 0 means asleep, or with --no-wait that it is on its way.
"""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    add_variant_options,
    new_command,
    variant_options,
)

_EXAMPLES = """\
  megpt sleep writer                                    returns when it is asleep
  megpt sleep writer --no-wait                          returns at once; `megpt ps` shows how far it is
  megpt sleep writer --url http://gpu-box:8000 --admin-key-file admin.key

On a GPU its weights move to host memory and what else it has on the device is freed; on a CPU its KV cache is
freed. The next request wakes it, in a fraction of a load's time. It must be idle, and a pinned model does not
sleep. Exit code: 0 asleep (with --no-wait: begun), 1 refused.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "sleep", summary="put an idle model of a running server to sleep", examples=_EXAMPLES
    )
    parser.add_argument("model", metavar="ID", help="one of those that `megpt ps` lists")
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is asleep"
    )
    add_variant_options(parser)
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Put it to sleep, and say how it went."""
    from memory_efficient_gpt_server.commands.admin_client import admin_client
    from memory_efficient_gpt_server.commands.tables import one_line

    with admin_client(args) as client:
        done, model = client.operate(args.model, "sleep", {"wait": args.wait, **variant_options(args)})
    more = "" if done else "; `megpt ps` shows how far it is"
    print(f"{one_line(model['variant'])}: {one_line(model['state'])}{more}")
    return 0
