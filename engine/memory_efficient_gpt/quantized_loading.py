"""From a model's name and what is wished for it to a transformers model, quantized in place.

Purpose: check the wishes before any weight is read, load, quantize, report bytes.
Does not know: engines, text, attention.
Invariant: a model that is quantized already is taken as it is or refused; it is never quantized again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
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
    present_schemes,
    quantize_model,
    report_of,
)
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import INT4, Scheme
from memory_efficient_gpt.quantization.wishes import Wish
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt.weight_memory import apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

_INSTEAD: Final = {
    "quantization": "Say bits=4, or scheme='int4' and the like.",
    "bits_per_weight": "`megpt quantize MODEL --bits-per-weight BITS --out FOLDER` measures which layers "
    "need more bits and writes a folder, which from_pretrained(FOLDER) loads; rules={'*.down_proj': 'int8'} "
    "sets layers apart without measuring.",
}
_OWN_FIELDS: Final = ("model", "quantization", "dtype", "device")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def engine_config(
    model: str, options: Mapping[str, Any], *, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> EngineConfig:
    """The settings of the engine that generates. Raises ConfigError for what it has no setting for."""
    allowed = [f.name for f in fields(EngineConfig) if f.name not in _OWN_FIELDS]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        others = f"Options of its engine: {', '.join(allowed)}."
        raise ConfigError(
            [f"{name!r} is no option of a QuantizedModel. {_INSTEAD.get(name, others)}" for name in unknown]
        )
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
    present = present_schemes(model)
    if present or getattr(model, "is_quantized", False):
        wanted.require_present(present, config.model)
        return report_of(model)
    scheme = wanted.scheme or default
    wanted.require_use_of_rounding(scheme)
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
