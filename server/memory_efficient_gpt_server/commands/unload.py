"""`megpt unload`: give a model's memory back on a running server.

Purpose: the command's options and help, and what is said at its end.
Does not know: HTTP, how requests are drained.
Invariant: exit code 0 means unloaded, or with --no-wait that the unload is under way.
"""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    add_variant_options,
    new_command,
    seconds,
    variant_options,
)

_EXAMPLES = """\
  megpt unload writer                                   when its requests have finished
  megpt unload writer --deadline 30                     ends what is left after 30 seconds
  megpt unload writer --mode abort                      ends its requests now
  megpt unload writer --quantization int4               that variant of it; the others stay
  megpt unload writer --mode if_idle                    only if nobody uses it or waits for it
  megpt unload writer --no-wait                         returns at once; `megpt ps` shows how far it is

Modes:

  drain     requests under way finish, new ones are refused (503) until the model is gone (the default)
  abort     requests under way end with the error model_unloading
  if_idle   refused if the model is in use

The next request for the model loads it again. A pinned model stays. Exit code: 0 unloaded (with --no-wait:
begun), 1 refused.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(commands, "unload", summary="unload a model of a running server", examples=_EXAMPLES)
    parser.add_argument("model", metavar="ID", help="one of those that `megpt ps` lists")
    parser.add_argument("--mode", choices=("drain", "abort", "if_idle"), default="drain", help="see below")
    parser.add_argument(
        "--deadline", type=seconds, metavar="SECONDS", help="for drain: end what is left after that time"
    )
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is unloaded"
    )
    add_variant_options(parser)
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unload, and say how it went. Raises ConfigError."""
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt_server.commands.admin_client import admin_client
    from memory_efficient_gpt_server.commands.tables import one_line

    if args.deadline is not None and args.mode != "drain":
        raise ConfigError([f"--deadline is for --mode drain, not {args.mode}; leave it out."])
    body = {"mode": args.mode, "wait": args.wait, **variant_options(args)}
    if args.deadline is not None:
        body["deadline_s"] = args.deadline
    with admin_client(args) as client:
        done, model = client.operate(args.model, "unload", body)
    more = "" if done else "; `megpt ps` shows how far it is"
    print(f"{one_line(model['variant'])}: {one_line(model['state'])}{more}")
    return 0
