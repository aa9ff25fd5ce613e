"""Checkpoint folders for tests: tiny models with some layers quantized, and the models they must equal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memory_efficient_gpt.loading import check_checkpoint, load_config, load_model, quantization_notes
from memory_efficient_gpt.quantization.model import quantized_modules
from tests.engine.quantization.foreign.packers import Grouped
from tests.engine.quantization.test_model import tiny

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[torch.Tensor], Grouped]
Pack = Callable[[Grouped], Tensors]

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    quantize: Quantize,
    pack: Pack,
    layers: tuple[str, ...] = LLAMA_LAYERS,
    *,
    transposed: bool = False,
) -> Tensors:
    """A checkpoint of `tiny(name)` whose layers with such last names are quantized.

    Returns the weights that the quantized layers stand for, `[N, K] float64`, by their names in the file.
    transposed: the float model keeps weights as `[K, N]`.
    """
    tiny(name).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    expected: Tensors = {}
    for key in sorted(state):
        layer = key.removesuffix(".weight")
        if layer == key or layer.rpartition(".")[2] not in layers:
            continue
        weight = state.pop(key)
        grouped = quantize(weight.t() if transposed else weight)
        expected[layer] = grouped.dequantize()
        state.update({f"{layer}.{own}": tensor for own, tensor in pack(grouped).items()})
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, settings)
    return expected


def change_config(folder: Path, settings: Mapping[str, Any], **fields: Any) -> None:
    """Set `quantization_config` and other fields of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"quantization_config": dict(settings), **fields}
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite model.safetensors after `change` was made to its tensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As the engine does."""
    check_checkpoint(folder)
    quantization_notes(folder)
    return load_model(folder, load_config(folder), dtype=dtype, device=torch.device("cpu"))


def float_twin(model: Any) -> Any:
    """An ordinary float32 model with the numbers of the quantized one."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    make: Any = AutoModelForCausalLM
    plain = make.from_config(config, dtype=torch.float32)
    state = dict(plain.state_dict())
    held = set(map(id, quantized_modules(model)))
    for key, tensor in model.state_dict().items():
        if key in state:
            state[key] = tensor.float()
    for key, module in model.named_modules():
        if id(module) in held:
            parameter = key if key in state else f"{key}.weight"
            weight = module.dequantize(torch.float32)
            state[parameter] = getattr(module, "weight", weight).float().reshape(state[parameter].shape)
    plain.load_state_dict(state)
    return plain.train(False)


def close_to(got: torch.Tensor, want: torch.Tensor, largest_offset: float) -> bool:
    """Whether they differ only by the rounding of offsets to float16, 2^-11 of themselves, and float32's."""
    limit = 2.0**-11 * largest_offset + 1e-6 * float(want.abs().max())
    return float((got.double() - want).abs().max()) <= limit
