"""`megpt quantize`: store a model's weights in fewer bits, as a folder that loads as it is.

Purpose: the command's options, and its parts put together.
Does not know: what can be wrong with them (quantize_checks.py), how weights are measured and quantized
(quantize_steps.py), how results look (quantize_display.py).
Invariant: wrong use is told before anything is loaded; an interrupted run leaves no folder behind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memory_efficient_gpt_server.commands.options import Commands, new_command, positive_int
from memory_efficient_gpt_server.commands.quantize_checks import (
    SELF_GENERATED_TOKENS,
    TEXT_CHARACTERS,
    check,
)

_EXAMPLES = """\
  megpt quantize demo --scheme int4 --out demo-int4             every layer alike; both ends in int8
  megpt quantize demo --bits-per-weight 4.8 --out demo-4.8      bits go to the layers that need them
  megpt quantize demo --bits-per-weight 4.8 --plan              only show which layers would get what
  megpt quantize demo --scheme int8 --plan                      what one scheme for all would cost
  megpt quantize demo --bits-per-weight 5 --calibration my-texts.txt --out demo-5
  megpt quantize demo --scheme int4-g128 --rule '*.down_proj=int8' --rule lm_head=bf16 --out demo-mine
  megpt quantize demo --scheme int4-g128 --rounding gptq --out demo-gptq     best quality of a scheme; minutes
  megpt quantize demo --scheme int4-asym-g64 --rounding hqq --out demo-hqq

A scheme is bits and what shares a scale: int4 (32 inputs of an output), int4-g128 (128 of them), int8 (all
inputs of an output), fp8, bf16 (not quantized); -asym adds zero points. Scales count as bits: int4 takes 4.5.

With --bits-per-weight each group of layers is stored less precisely for a moment, and the change of the
model's predictions on a text is measured: the KL divergence, in nats per token. The plan with the least sum
within the budget is taken. The text is a file of yours or one that the model writes. Either also tells what
goes into each layer: rounding by gptq lets each weight make up for the errors of those before it, which
halves what 4 bits cost.

Serve the result with `megpt serve --model DIR`; plain transformers needs `register_format()` before it.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "quantize", summary="store a model's weights in fewer bits", examples=_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="bundled model's name, checkpoint folder, or hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--plan", action="store_true", help="measure and print what would be done; instead of --out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    _add_scheme_options(parser)
    _add_calibration_options(parser)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--num-threads", type=positive_int, metavar="N", help="CPU threads")
    parser.add_argument("--revision", metavar="NAME", help="commit, tag or branch of a hub id")
    parser.set_defaults(run=run)


def _add_scheme_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how precisely (one of the first two)")
    group.add_argument("--scheme", metavar="SCHEME", help="one scheme for all layers; int8 for both ends")
    group.add_argument(
        "--bits-per-weight", type=float, metavar="BITS", help="average over all layers, scales counted"
    )
    group.add_argument(
        "--mix",
        metavar="SCHEMES",
        help="what --bits-per-weight may use, with commas (default: several int4, int8)",
    )
    group.add_argument(
        "--rule", action="append", default=[], metavar="PATTERN=SCHEME",
        help="scheme of the layers whose name matches; the first one that does counts",
    )  # fmt: skip
    group.add_argument(
        "--rounding", metavar="HOW",
        help="gptq (the least error of a layer's outputs on a text; default where there is one), search (the "
        "least error of weights; default elsewhere), nearest, or hqq (for zero points)",
    )  # fmt: skip
    group.add_argument(
        "--tied", action="store_true",
        help="one scheme for queries, keys and values together, gate and up too, as fused kernels want them",
    )  # fmt: skip
    group.add_argument(
        "--exact", action="store_true", help="measure every scheme of every group, not only the coarsest"
    )


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help=f"text in UTF-8, of the kind the model will see; its first {TEXT_CHARACTERS:,} characters count",
    )  # fmt: skip
    group.add_argument(
        "--calibrate-tokens", type=positive_int, metavar="N",
        help=f"tokens that the model writes itself (default: {SELF_GENERATED_TOKENS:,} where needed); all "
        "tell how large inputs are, and predictions are compared on up to 1,024 of them",
    )  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N", help="of that text (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Check, then measure, quantize and write, or only show the plan."""
    job = check(args)

    import torch

    from memory_efficient_gpt_server.commands.quantize_display import phase_bars, show
    from memory_efficient_gpt_server.commands.quantize_steps import carry_out

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    with phase_bars() as progress:
        outcome = carry_out(job, progress)
    show(job, outcome, as_json=args.json)
    return 0
