"""`megpt kernels build`: compile kernels now, so that nobody waits for them later.

Purpose: the command's options, what is built, and how it is told.
Does not know: how kernels are compiled (the engine's kernel_builds.py).
Invariant: what could not be built is an error with its reason, not a warning.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_engine_options,
    engine_options,
    new_command,
)

if TYPE_CHECKING:
    from memory_efficient_gpt.kernel_builds import Build

_EXAMPLES = """\
  megpt kernels build                                     the CPU's kernels: the same for all models
  megpt kernels build Qwen/Qwen3-8B --quantization int4   a GPU's, for a model as it will be served
  megpt kernels build ./a ./b --cache /app/kernels        serve with MEGPT_CACHE_DIR=/app/kernels then

CPU kernels are C++, compiled for this CPU. GPU kernels are Triton's, compiled for this GPU by running a
model's steps on random weights of few layers: no weights are read, of a hub id only the config is fetched.
Give the options that it will be served with: dtype, quantization and the KV cache's type are part of a
kernel. What is served otherwise, on another kind of GPU, or by other versions of Triton or of this package,
is compiled at its first use, as ever.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    kernels = new_command(
        commands, "kernels", summary="compile kernels before they are needed", examples=_EXAMPLES
    )
    actions = kernels.add_subparsers(metavar="ACTION", required=True)
    parser = new_command(
        actions, "build", summary="compile kernels into the cache folder", examples=_EXAMPLES
    )
    parser.add_argument(
        "model", nargs="*", metavar="MODEL", help="what to compile a GPU's kernels for (default: the CPU's)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR",
        help="folder for both kinds (default: $MEGPT_CACHE_DIR, or each kind's own)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build and tell. Mutates os.environ where a folder is given: that is how both kinds are told of it."""
    if args.cache is not None:
        os.environ["MEGPT_CACHE_DIR"] = str(args.cache.resolve())
        os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve() / "triton")

    from memory_efficient_gpt.config import EngineConfig
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt.kernel_builds import build_for_model, build_native
    from memory_efficient_gpt_server.commands.quantize_display import phase_bars

    options = engine_options(args)
    if options and not args.model:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ConfigError([f"{given}: for a GPU's kernels, which need a MODEL. The CPU's take no options."])
    configs = [EngineConfig(model=model, **options) for model in args.model]
    with phase_bars() as progress:
        if not configs:
            progress("cpu", "compiling", 0.0)
        builds = [build_for_model(config, partial(progress, config.model)) for config in configs]
        builds = builds or [build_native()]
    for build in builds:
        print(json.dumps(_as_json(build)) if args.json else _as_text(build))
    return 0


def _as_json(build: Build) -> dict[str, Any]:
    return {
        "what": build.what, "folder": str(build.folder), "new": build.new,
        "seconds": round(build.seconds, 2), "notes": list(build.notes),
    }  # fmt: skip


def _as_text(build: Build) -> str:
    state = f"{build.new} new" if build.new else "nothing new"
    lines = [f"{build.what}: {state} in {build.folder} ({build.seconds:.1f} s)"]
    return "\n".join([*lines, *(f"  {note}" for note in build.notes)])
