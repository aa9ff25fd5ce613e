"""The `megpt` command line.

Purpose: from arguments to one command, and from its errors to messages and exit codes.
Does not know: what commands do.
Invariant: nothing heavy is imported before a command runs, so that `megpt --help` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from memory_efficient_gpt.errors import ConfigError, MegptError
from memory_efficient_gpt_server.commands import (
    bench,
    chat,
    doctor,
    events,
    generate,
    kernels,
    load,
    models,
    operations,
    plan,
    ps,
    quantize,
    queue,
    serve,
    sleep,
    top,
    unload,
    version,
    wake,
)
from memory_efficient_gpt_server.commands import set as set_settings

COMMANDS: Final = (
    serve, generate, chat, plan, quantize, models, ps, load, unload, sleep, wake, set_settings, queue,
    operations, events, top, bench, kernels, doctor, version,
)  # fmt: skip

EXIT_FAILED: Final = 1
EXIT_WRONG_USE: Final = 2
EXIT_INTERRUPTED: Final = 130

EPILOG: Final = """\
start here:
  megpt serve                          serve the bundled demo model on http://127.0.0.1:8000
  megpt generate demo -p "Once upon"   continue a text, in this terminal
  megpt chat demo                      talk to a model, in this terminal
  megpt quantize demo --scheme int4 --out demo-int4
                                       store its weights in a quarter of the bytes
  megpt plan demo demo-mha             what models will take in memory, and whether they fit
  megpt top                            watch the models of a running server; models, ps, queue, operations
                                       and events tell more of them; load, unload, sleep, wake and set
                                       change them
  megpt doctor                         what this machine offers, and what is wrong with it

`megpt COMMAND --help` explains a command with examples. A MODEL is the name of a bundled model
(demo, demo-draft, demo-mha), a folder with config.json and *.safetensors, or a hub id (org/name).
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="megpt",
        description="Run language models in little memory: as an OpenAI-shaped server, or right here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Mutates os.environ: sets OMP_WAIT_POLICY if it is unset."""
    args = build_parser().parse_args(argv)
    # Read once, when torch is first imported: waiting threads must not burn the cores of other engines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"megpt: {_listed(error.problems)}", file=sys.stderr)
        return EXIT_WRONG_USE
    except MegptError as error:
        print(f"megpt: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return code


def _listed(problems: Sequence[str]) -> str:
    """One problem speaks for itself; several get a heading."""
    if len(problems) == 1:
        return problems[0]
    return "the settings are wrong:\n" + "\n".join(f"  - {problem}" for problem in problems)
