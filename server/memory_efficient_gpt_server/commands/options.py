"""Options that several commands share.

Purpose: one description of each, and the values that were really given.
Does not know: what they are used for.
Invariant: an option that was not given is absent, so that defaults stay where they are defined.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memory_efficient_gpt.request import SamplingParams

Commands = argparse._SubParsersAction  # argparse's own name; it has no public one

DEFAULT_URL: Final = "http://127.0.0.1:8000"
ADMIN_KEY_ENV: Final = "MEGPT_ADMIN_KEY"

_ENGINE_OPTIONS: Final = (
    "device", "dtype", "quantization", "kv_cache_dtype", "max_model_len", "kv_cache_bytes", "max_num_seqs",
    "num_threads", "deterministic", "tier", "revision",
)  # fmt: skip
_SAMPLING_OPTIONS: Final = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip


def new_command(
    commands: Commands[argparse.ArgumentParser], name: str, *, summary: str, examples: str
) -> Any:
    """A parser for command `name` whose help ends with `examples`."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded: the most useful fields of EngineConfig."""
    group = parser.add_argument_group("engine options")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    group.add_argument(
        "--quantization",
        metavar="SCHEME",
        help="store weights as int4, int8, int4-g128, bnb-nf4 ... (default: as they are)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
        help="of the KV cache",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="prompt + output of a request (default: the model's)",
    )
    group.add_argument(
        "--kv-cache-bytes",
        type=byte_size,
        metavar="SIZE",
        help="KV cache, for example 512MiB (default: automatic)",
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences computed together (default: 64)"
    )
    group.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="same tokens whatever is computed beside a request (costs speed on GPUs)",
    )
    group.add_argument("--tier", choices=("B", "C"), help="force packed paged (B) or plain transformers (C)")
    group.add_argument("--revision", metavar="NAME", help="commit, tag or branch of a hub id")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen: the most useful fields of SamplingParams."""
    group = parser.add_argument_group("sampling options")
    group.add_argument("--max-tokens", "-n", type=int, metavar="N", help="most tokens of an answer")
    group.add_argument(
        "--temperature", "-t", type=float, metavar="T", help="0 takes the likeliest token (default: 1)"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that sum to P")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P x the likeliest one's")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="from -2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="from -2 to 2")
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text (up to 4 times)")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Which running server, and who asks. Keys are no options: other users see a process's arguments."""
    group = parser.add_argument_group("server options")
    group.add_argument("--url", default=DEFAULT_URL, help=f"the server's address (default: {DEFAULT_URL})")
    group.add_argument(
        "--admin-key-file", type=Path, metavar="FILE",
        help=f"holds the server's admin key (default: the variable {ADMIN_KEY_ENV})",
    )  # fmt: skip


def add_variant_options(parser: argparse.ArgumentParser) -> None:
    """Which variant of a running server's model. What a model may be had as is the server's to say."""
    group = parser.add_argument_group("variant options (default: the model as it is configured)")
    group.add_argument("--quantization", metavar="SCHEME", help="weights as int4, int8, bf16 ...")
    group.add_argument("--kv-cache-dtype", metavar="TYPE", help="KV cache in int8, bfloat16 ...")


def variant_options(args: argparse.Namespace) -> dict[str, Any]:
    """The body's `optimizations`, if any of these options was given."""
    given = _given(args, ("quantization", "kv_cache_dtype"))
    return {"optimizations": given} if given else {}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, as EngineConfig's fields."""
    return _given(args, _ENGINE_OPTIONS)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, as SamplingParams' fields."""
    given = _given(args, _SAMPLING_OPTIONS)
    return given | {"stop": tuple(args.stop)} if args.stop else given


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """SamplingParams from `defaults` and the options that were given."""
    from memory_efficient_gpt.request import SamplingParams

    return SamplingParams(**(defaults | sampling_options(args)))


def byte_size(text: str) -> int:
    """Bytes from "4096", "512MiB", "1.5GB"; decimal and binary units. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I)?)?B?", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write bytes or a number with KB, MB, GB, KiB, MiB or GiB"
        )
    number, unit, binary = found.groups()
    power = " KMGT".index(unit or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def positive_int(text: str) -> int:
    """An integer of at least 1. Raises ArgumentTypeError."""
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")


def seconds(text: str) -> float:
    """A time of at least 0. Raises ArgumentTypeError."""
    try:
        if 0 <= (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text!r}")


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}
