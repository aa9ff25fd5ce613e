"""`megpt top`: a running server's models, live in the terminal.

Purpose: the command's options, and one frame after the other.
Does not know: what a frame holds.
Invariant: it changes nothing on the server; a server that goes away is told in the frame, and asked again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    new_command,
    seconds,
)

if TYPE_CHECKING:
    from rich.console import Console

    from memory_efficient_gpt_server.commands.admin_client import AdminClient

LEAST_INTERVAL_S: Final = 0.05

_EXAMPLES = """\
  megpt top                                             the server on this machine; Ctrl-C ends it
  megpt top --once                                      one frame, after a second of measuring, then ends
  megpt top --interval 5 --url http://gpu-box:8000 --admin-key-file admin.key

It shows each device's bytes in use against the budget, how many models were evicted and why, how many
requests wait for models, and for every model its state, the requests that use it (leases) and wait for it,
its memory, and the tokens that it reads and writes per second. Without a terminal it prints one frame, as
with --once.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(commands, "top", summary="watch the models of a running server", examples=_EXAMPLES)
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="between frames (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show frames until interrupted, or one."""
    from rich.console import Console

    from memory_efficient_gpt_server.commands.admin_client import admin_client

    interval_s = max(args.interval, LEAST_INTERVAL_S)
    with admin_client(args) as client:
        if args.once or not sys.stdout.isatty():
            print_frame(client, Console(highlight=False), interval_s)
        else:
            watch(client, Console(highlight=False), interval_s)
    return 0


def print_frame(client: AdminClient, console: Console, interval_s: float) -> None:
    """One frame, with the rates of one interval. Without a terminal no line is cut."""
    from memory_efficient_gpt_server.commands.top_display import frame
    from memory_efficient_gpt_server.commands.top_readings import read

    before = read(client)
    time.sleep(interval_s)
    if not console.is_terminal:
        console.width = 10_000
    console.print(frame(client.url, before, read(client)), crop=False)


def watch(
    client: AdminClient,
    console: Console,
    interval_s: float,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Frames until Ctrl-C. Raises ServerRefusedError for the first reading; later ones are tried again."""
    from rich.live import Live

    from memory_efficient_gpt_server.commands.admin_client import ServerRefusedError
    from memory_efficient_gpt_server.commands.top_display import frame
    from memory_efficient_gpt_server.commands.top_readings import read

    before, now = None, read(client)
    try:
        with Live(frame(client.url, before, now), console=console, auto_refresh=False) as live:
            while True:
                pause(interval_s)
                try:
                    before, now, trouble = now, read(client), None
                except ServerRefusedError as error:
                    trouble = str(error)
                live.update(frame(client.url, before, now, trouble), refresh=True)
    except KeyboardInterrupt:
        return
