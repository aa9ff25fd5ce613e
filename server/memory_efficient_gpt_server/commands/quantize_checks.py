"""What `megpt quantize` was asked for, checked before any weight is read.

Purpose: from arguments to a job, or to every problem they have.
Does not know: how a job is carried out.
Invariant: problems of the arguments are told all together; the model's folder and config are read only when
there is none, its weights never.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from memory_efficient_gpt.quantization.layers import Layer
    from memory_efficient_gpt.quantization.rounding import Rounding
    from memory_efficient_gpt.quantization.scheme import Scheme

TEXT_CHARACTERS: Final = 1_000_000
TEXT_TOKENS: Final = 16384
SELF_GENERATED_TOKENS: Final = 4096
GPTQ_GENERATED_TOKENS: Final = 16384

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. bits: the budget, None for one scheme; schemes: those to mix, or that one.

    text: pieces of the calibration file `[B, T]`; out: None if only the plan is wanted.
    """

    model: str
    folder: Path
    weight_files: tuple[Path, ...]
    config: PreTrainedConfig
    bits: float | None
    schemes: tuple[Scheme, ...]
    rules: Mapping[str, Scheme]
    rounding: Rounding
    exact: bool
    tied: bool
    text: torch.Tensor | None
    text_name: str | None
    generated_tokens: int | None
    seed: int
    device: torch.device
    out: Path | None

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured, on whatever text."""
        return (
            self.bits is not None or self.out is None or self.text_name is not None or self.rounding == "gptq"
        )


def check(args: argparse.Namespace) -> Job:
    """The job that `args` describe. Raises ConfigError with all problems, or what finding a model raises."""
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt.quantization.plans import parse_rules

    problems = [*_contradictions(args), *_out_problems(args.out, wanted=not args.plan)]
    schemes = _collect(problems, lambda: _schemes(args))
    rules = _collect(problems, lambda: parse_rules(args.rule))
    text = _collect(problems, lambda: _read_text(args.calibration))
    if schemes and rules is not None:
        _collect(problems, lambda: _check_rounding(args, [*schemes, *rules.values()]))
    if problems:
        raise ConfigError(problems)
    return _with_model(args, schemes or (), rules or {}, text)


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    from memory_efficient_gpt.quantization.calibration import LEAST_TOKENS

    both, neither = args.scheme and args.bits_per_weight is not None, not args.scheme
    if both or (neither and args.bits_per_weight is None):
        yield (
            "give either --scheme (one for all layers, as in --scheme int4) or --bits-per-weight (a mix "
            f"within a budget, as in --bits-per-weight 4.8){', not both' if both else ''}."
        )
    if args.mix is not None and args.bits_per_weight is None:
        yield "--mix says what --bits-per-weight may choose from; give that too, or --rule with --scheme."
    if args.tied and args.bits_per_weight is None:
        yield "--tied is about mixes: with --scheme all layers have one scheme anyway."
    if args.exact and args.bits_per_weight is None and not args.plan:
        yield "--exact is about measuring, and --scheme measures nothing without --plan."
    if args.calibration is not None and args.calibrate_tokens is not None:
        yield "give a text with --calibration or let the model write one with --calibrate-tokens, not both."
    if args.calibrate_tokens is not None and args.calibrate_tokens < LEAST_TOKENS:
        yield f"--calibrate-tokens is {args.calibrate_tokens}; at least {LEAST_TOKENS} are needed."
    written = args.bits_per_weight is not None or args.plan or args.calibrate_tokens is not None
    if args.seed is not None and (args.calibration is not None or not written):
        yield (
            "--seed is of the text that the model writes itself, and none is written here. Leave it out, or "
            "give --calibrate-tokens."
        )


def _out_problems(out: Path | None, *, wanted: bool) -> Iterator[str]:
    if out is None or not wanted:
        if (out is None) == wanted:
            yield (
                "--out DIR is needed: the folder to write. With --plan nothing is written."
                if wanted
                else f"--plan writes nothing, so that --out {out} would stay empty. Leave one of them out."
            )
        return
    out = _absolute(out)
    if out.exists() and not out.is_dir():
        yield f"--out {out} is a file. Give a new folder."
    elif out.is_dir() and any(out.iterdir()):
        yield f"--out {out} is not empty. Give a new folder, or empty it."
    existing = next(folder for folder in out.parents if folder.exists())
    if not _takes_folders(existing):
        yield f"--out {out} cannot be made: {existing} is not a folder that may be written to."


def _takes_folders(folder: Path) -> bool:
    """By trying: permissions don't say it of every file system."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".megpt-", dir=folder))
    except OSError:
        return False
    return True


def _schemes(args: argparse.Namespace) -> tuple[Scheme, ...]:
    from memory_efficient_gpt.quantization.budget import DEFAULT_OPTIONS
    from memory_efficient_gpt.quantization.scheme import parse_scheme

    if args.scheme:
        return (parse_scheme(args.scheme),)
    if args.mix is None:
        return DEFAULT_OPTIONS
    return tuple(dict.fromkeys(parse_scheme(name) for name in args.mix.split(",")))


def _read_text(path: Path | None) -> str | None:
    from memory_efficient_gpt.errors import ConfigError

    if path is None:
        return None
    try:
        with path.expanduser().open(encoding="utf-8") as file:
            return file.read(TEXT_CHARACTERS)
    except UnicodeDecodeError as error:
        why = f"it is not text in UTF-8 (byte {error.object[error.start]:#04x} at {error.start:,})"
        raise ConfigError([f"--calibration {path} cannot be used: {why}. Convert it first."]) from error
    except OSError as error:
        raise ConfigError([f"--calibration {path} cannot be read: {error.strerror}."]) from error


def _rounding(args: argparse.Namespace) -> str:
    """What was asked for, else the best for what will be known of the model's inputs."""
    text = (
        args.bits_per_weight is not None or args.calibration is not None or args.calibrate_tokens is not None
    )
    return args.rounding or ("gptq" if text else "search")


def _check_rounding(args: argparse.Namespace, schemes: Sequence[Scheme]) -> None:
    """Every scheme must be one that can be rounded here, and what was asked for of use to one at least."""
    from memory_efficient_gpt.quantization.rounding import check_rounding, rounding_of

    rounding = _rounding(args)
    for scheme in schemes:
        rounding_of(scheme, cast("Rounding", rounding))
    if args.rounding is not None:
        integers = [scheme for scheme in schemes if scheme.kind == "int"]
        with_offsets = [scheme for scheme in integers if not scheme.symmetric]
        check_rounding((with_offsets or integers or list(schemes))[0], rounding)


def _with_model(
    args: argparse.Namespace, schemes: tuple[Scheme, ...], rules: Mapping[str, Scheme], text: str | None
) -> Job:
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt.hardware import resolve_device
    from memory_efficient_gpt.loading import (
        check_checkpoint,
        load_config,
        quantization_settings,
        resolve_model,
    )

    device = resolve_device(args.device)
    folder = resolve_model(args.model, args.revision)
    files = check_checkpoint(folder)
    config = load_config(folder)
    if quantization_settings(folder) is not None:
        raise ConfigError([f"{args.model} is quantized already. Give the checkpoint it was made from."])
    _check_plan(config, schemes, args.bits_per_weight, rules)
    return Job(
        model=args.model, folder=folder, weight_files=tuple(files), config=config, bits=args.bits_per_weight,
        schemes=schemes, rules=rules, rounding=cast("Rounding", _rounding(args)), exact=args.exact,
        tied=args.tied,
        text=_pieces(folder, config, text) if text is not None else None,
        text_name=_text_name(args), generated_tokens=args.calibrate_tokens, seed=args.seed or 0,
        device=device, out=None if args.plan else _absolute(args.out),
    )  # fmt: skip


def _check_plan(
    config: PreTrainedConfig, schemes: tuple[Scheme, ...], bits: float | None, rules: Mapping[str, Scheme]
) -> None:
    """Rules must match a layer, and the budget lie within what the schemes allow for these layers."""
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt.quantization.groups import bits_range, group_layers
    from memory_efficient_gpt.quantization.plans import pins

    layers = _layers_of(config)
    pinned = pins(layers, rules)
    if bits is None:
        return
    least, most = bits_range(group_layers(layers, pinned), schemes)
    if not least <= bits <= most:
        names = ", ".join(map(str, schemes)) + (" and the rules" if rules else "")
        low, high = math.ceil(least * 1000) / 1000, math.floor(most * 1000) / 1000
        raise ConfigError(
            [f"--bits-per-weight is {bits:g}; with {names} this model takes from {low:g} to {high:g}. "
             "Choose a budget in between, or other schemes with --mix."]
        )  # fmt: skip


def _layers_of(config: PreTrainedConfig) -> list[Layer]:
    """The layers of a model without weights."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from memory_efficient_gpt.errors import UnsupportedModelError
    from memory_efficient_gpt.quantization.layers import find_layers

    from_config: Callable[..., Any] = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return find_layers(from_config(copy.deepcopy(config)))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(config).__name__} cannot be built: {type(error).__name__}: {error}"
        ) from error


def _pieces(folder: Path, config: PreTrainedConfig, text: str) -> torch.Tensor:
    from memory_efficient_gpt.quantization.calibration import split_text
    from memory_efficient_gpt.tokenizer import Tokenizer

    return split_text(config, Tokenizer.load(folder).encode(text), most_tokens=TEXT_TOKENS)


def _text_name(args: argparse.Namespace) -> str | None:
    if args.calibration is not None:
        return str(args.calibration)
    return "a text the model wrote" if args.calibrate_tokens is not None else None


def _absolute(path: Path) -> Path:
    """Without `..`, as links have it."""
    path = path.expanduser().absolute()
    return path.resolve() if ".." in path.parts else path


def _collect(problems: list[str], find: Callable[[], T]) -> T | None:
    """What `find` gives, or None and its problems."""
    from memory_efficient_gpt.errors import ConfigError

    try:
        return find()
    except ConfigError as error:
        problems += error.problems
        return None
