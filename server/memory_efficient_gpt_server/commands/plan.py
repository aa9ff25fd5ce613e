"""`megpt plan`: what models will take in memory, whether they fit, and what would.

Purpose: the command's options, and its parts put together.
Does not know: how bytes are found, which changes are tried (plan_steps.py), how a plan looks
(plan_display.py).
Invariant: no weight is read, and of a hub id only its descriptions are downloaded.
"""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_engine_options,
    byte_size,
    engine_options,
    new_command,
)

_EXAMPLES = """\
  megpt plan demo                                       what one model takes here
  megpt plan demo demo-mha ./my-model                   all at once, each in a worker of its own
  megpt plan ./my-model --quantization int4             with weights of 4 bits
  megpt plan ./my-model --memory-budget 8GiB            under a server's memory_budget_bytes: 8589934592
  megpt plan ./my-model --max-model-len 8192 --kv-cache-dtype int8
  megpt plan ./my-model --json | jq .fits

A model takes three kinds of memory:

  weights     its numbers, as --quantization stores them for this device's kernels
  KV cache    what attention remembers of running requests: as many bytes for each token as the model's heads
              need, for --max-num-seqs requests of --max-model-len tokens, but no more than 30% of what is
              free (90% on a GPU); --kv-cache-bytes sets it
  workspace   the worker process and its largest step; an allowance, the other two are exact

Models are counted in the order given, each with what the ones before it leave. A plan fits if all of them do,
each with its whole context. If they do not, changes are tried and those that would do are listed, with the
options to give. Nothing is loaded: it takes some seconds to start and about a second a model, more on a busy
machine. Exit code: 0 it fits, 1 it does not.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "plan", summary="say what models will take in memory, before loading them",
        examples=_EXAMPLES,
    )  # fmt: skip
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="bundled model's name, checkpoint folder, or hub id"
    )
    parser.add_argument(
        "--memory-budget", type=byte_size, metavar="SIZE",
        help="what they must fit into, for example 8GiB, as a server's memory_budget_bytes: the server "
        "itself does not count (default: what is free on the device now, for models and server)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Estimate, look for what would fit, print; 1 if it does not fit."""
    from memory_efficient_gpt.config import EngineConfig
    from memory_efficient_gpt_server.commands.plan_display import show
    from memory_efficient_gpt_server.commands.plan_steps import make_plan

    configs = [EngineConfig(model=model, **engine_options(args)) for model in args.models]
    plan = make_plan(configs, args.memory_budget)
    show(plan, as_json=args.json)
    return 0 if plan.fits else 1
