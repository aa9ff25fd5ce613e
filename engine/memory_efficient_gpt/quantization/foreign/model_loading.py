"""Models from checkpoints that other libraries quantized.

Purpose: recognise such a checkpoint, and let transformers build the model with our quantized modules.
Does not know: how the formats store weights.
Invariant: the model is what the checkpoint's float weights would give, but for the rounding in raw_weight.py;
the peak is the quantized model plus one layer (or one stack of experts).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from memory_efficient_gpt.quantization.checkpoint import register_format
from memory_efficient_gpt.quantization.description import METHOD, VERSION
from memory_efficient_gpt.quantization.foreign import awq, compressed_tensors, gptq
from memory_efficient_gpt.quantization.foreign.conversion import Converted, convert, find_quantized
from memory_efficient_gpt.quantization.foreign.formats import LayerFormat, Settings
from memory_efficient_gpt.quantization.foreign.placement import ModelNames
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors, TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_GENERATION_CONFIG: Final = "generation_config.json"
_READERS: Final[Mapping[str, Callable[[Settings], LayerFormat]]] = {
    "gptq": gptq.read_settings,
    "awq": awq.read_settings,
    "compressed-tensors": compressed_tensors.read_settings,
}


def format_of(settings: Settings) -> LayerFormat | None:
    """The format that a `quantization_config` names; None for one that is not read here.

    Raises UnsupportedModelError or CheckpointError for settings of a known format that cannot be loaded.
    """
    read_settings = _READERS.get(str(settings.get("quant_method")))
    return read_settings(settings) if read_settings is not None else None


def load_foreign(
    files: Sequence[Path],
    layer_format: LayerFormat,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with our quantized modules, and transformers' report of missing and unexpected weights."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with TensorFiles(files) as opened:
        layers = find_quantized(opened, layer_format)
        empty = _build_on_meta(config, dtype)
        names = ModelNames(empty)
        if _untie(config, opened, layers, names):
            empty = _build_on_meta(config, dtype)
            names = ModelNames(empty)
        converted = convert(opened, layers, layer_format, names, dtype)
        config.quantization_config = _describe(converted, names)
        register_format()
        from_pretrained: Any = type(empty).from_pretrained  # its annotations miss output_loading_info
        model, report = from_pretrained(
            None,
            config=config,
            state_dict=converted.state,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    if (path := files[0].with_name(_GENERATION_CONFIG)).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(path.parent)
    return cast("tuple[PreTrainedModel, dict[str, Any]]", (model, report))


def _build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = from_config(copy.deepcopy(config), dtype=dtype)
    return model


def _untie(
    config: PreTrainedConfig, files: TensorFiles, layers: Mapping[str, LayerTensors], names: ModelNames
) -> bool:
    """Whether the config's tie of head and embedding had to go: the files have a weight for each."""
    for layer in names.tied():
        quantized = {place.module for name in layers if (place := names.place(name)) is not None}
        stored = {names.parameter(name) for name in files}
        present = [name for name in layer.names if name in quantized or f"{name}.weight" in stored]
        if len(present) > 1 and quantized.intersection(present):
            config.tie_word_embeddings = False
            return True
    return False


def _describe(converted: Converted, names: ModelNames) -> dict[str, Any]:
    """The `quantization_config` of our own format."""
    modules, shared = dict(converted.modules), dict[str, str]()
    for layer in names.tied():
        owners = [name for name in layer.names if name in modules]
        for name in layer.names:
            if owners and name != owners[0]:
                shared[name], modules[name] = owners[0], modules[owners[0]]
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "modules": modules,
        "shared": shared,
        "reordered": converted.reordered,
    }
