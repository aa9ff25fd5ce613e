"""From a model's name and what is wished for it to a transformers model, quantized in place.

Purpose: check the wishes before any weight is read, load, quantize, report bytes.
Does not know: engines, text, attention.
Invariant: a model that is quantized already is taken as it is or refused; it is never quantized again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from memory_efficient_gpt.assembly import cpu_kernels
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.hardware import resolve_device
from memory_efficient_gpt.kv_cache.geometry import causal_model_class
from memory_efficient_gpt.loading import (
    check_checkpoint,
    load_config,
    load_model,
    quantization_settings,
    resolve_dtype,
    resolve_model,
)
from memory_efficient_gpt.quantization import bitsandbytes
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import (
    QuantizationReport,
    main_scheme,
    quantize_model,
    report_of,
)
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.rounding import Rounding, rounding_of
from memory_efficient_gpt.quantization.scheme import INT4, INT8, UNQUANTIZED, Scheme, parse_scheme
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt.weight_memory import apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

_BY_BITS: Final = {4: INT4, 8: INT8, 16: UNQUANTIZED}
_OWN_FIELDS: Final = ("model", "quantization", "dtype", "device")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Wish:
    """How weights shall be stored. scheme None: as a quantized checkpoint has them, else a default.

    exact: whether `scheme` was named; else any scheme of as many bits will do.
    """

    scheme: Scheme | None = None
    exact: bool = False
    rounding: Rounding = "search"
    rules: Mapping[str, Scheme] = field(default_factory=dict)

    def fits(self, present: Scheme) -> bool:
        """Whether weights stored as `present` are what is wished for."""
        if self.scheme is None:
            return True
        return present == self.scheme if self.exact else present.bits == self.scheme.bits


def wish(
    bits: int | None, scheme: str | None, rounding: Rounding, rules: Mapping[str, str | Scheme] | None
) -> Wish:
    """Check what a user wrote. Raises ConfigError with every problem."""
    problems: list[str] = []
    found: Scheme | None = None
    parsed: dict[str, Scheme] = {}
    if bits is not None and scheme is not None:
        problems.append(f"bits {bits} and scheme {scheme!r} both say how weights are stored; give one.")
    if bits is not None and (isinstance(bits, bool) or bits not in _BY_BITS):
        problems.append(f"bits must be 4, 8 or 16 (not quantized), got {bits!r}.")
    try:
        found = parse_scheme(scheme) if scheme is not None else _BY_BITS.get(bits or 0)
    except ConfigError as error:
        problems += error.problems
    for pattern, rule in (rules or {}).items():
        try:
            parsed[pattern] = parse_scheme(rule) if isinstance(rule, str) else rule
        except ConfigError as error:
            problems += [f"rules[{pattern!r}]: {problem}" for problem in error.problems]
    try:
        rounding_of(INT4, rounding)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Wish(found, scheme is not None, rounding, parsed)


def engine_config(
    model: str, options: Mapping[str, Any], *, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> EngineConfig:
    """The settings of the engine that generates. Raises ConfigError for what it has no setting for."""
    allowed = [f.name for f in fields(EngineConfig) if f.name not in _OWN_FIELDS]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ConfigError(
            [f"{name!r} is no option of a QuantizedModel. Options of its engine: {', '.join(allowed)}."
             for name in unknown]
        )  # fmt: skip
    named: Any = str(dtype).removeprefix("torch.")
    return EngineConfig(model=model, dtype=named, device=str(device), **options)


def load(
    config: EngineConfig, wanted: Wish, progress: Progress | None
) -> tuple[PreTrainedModel, Path, QuantizationReport]:
    """The model as wished, its folder, and what became of its bytes.

    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError or ConfigError.
    """
    told = progress or (lambda phase, share: None)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    asked = (wanted.scheme, *wanted.rules.values())
    if any(scheme is not None and scheme.by_bitsandbytes for scheme in asked):
        bitsandbytes.require()
    told("checking files", 0.0)
    folder = resolve_model(config.model, config.revision)
    check_checkpoint(folder)
    model_config = load_config(folder)
    causal_model_class(model_config)
    told("loading weights", 0.1)
    dtype, _ = resolve_dtype(config.dtype, model_config, device)
    quantizes = quantization_settings(folder) is None and (
        bool(wanted.rules) or (wanted.scheme or INT4).kind != "none"
    )
    home = torch.device("cpu") if quantizes else device  # float weights go to a GPU one by one then
    model = load_model(folder, model_config, dtype=dtype, device=home)
    with apart(device):
        report = quantize(
            model, wanted, config, default=INT4, device=device,
            progress=lambda phase, share: told(phase, 0.4 + 0.6 * share),
        )  # fmt: skip
    told("ready", 1.0)
    return model, folder, report


def quantize(
    model: PreTrainedModel,
    wanted: Wish,
    config: EngineConfig,
    *,
    default: Scheme,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Store the weights of `model` as wished, in place, or as `default` if no scheme was.

    device: where the model is to be, if it is not there yet.
    Raises ConfigError if they are quantized otherwise already.
    """
    present = main_scheme(model)
    if present is not None or getattr(model, "is_quantized", False):
        if present is None and (wanted.scheme is not None or wanted.rules):
            raise ConfigError([f"{config.model} is quantized already, in a format that is kept as it is."])
        if present is not None and (not wanted.fits(present) or wanted.rules):
            raise ConfigError(
                [f"{config.model} is quantized already, as {present}; {wanted.scheme or 'other rules'} was "
                 "asked for. Leave bits, scheme and rules out, or give the checkpoint it was made from."]
            )  # fmt: skip
        return report_of(model)
    scheme = wanted.scheme or default
    if scheme.kind == "none" and not wanted.rules:
        return report_of(model)
    layers = find_layers(model)
    plan = uniform_plan(layers, scheme, rules=wanted.rules)
    for note in bitsandbytes.left_alone(layers, scheme):
        logger.warning(note)
    told = None if progress is None else (lambda name, share: progress(f"quantizing {name}", share))
    kernels = cpu_kernels(config, device or model.device)
    return quantize_model(
        model, plan, rounding=wanted.rounding, kernels=kernels, progress=told, device=device
    )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, None if it has no files of one. Raises CheckpointError for damaged ones."""
    present = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return Tokenizer.load(folder) if present else None
