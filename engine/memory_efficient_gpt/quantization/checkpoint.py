"""Quantized models as Hugging Face folders: written once, loaded without quantizing again.

Purpose: the folder's `quantization_config`, saving, and the hook by which transformers loads it.
Does not know: how codes were chosen; the engine.
Invariant: what is loaded equals what was saved bit for bit; a weight that two modules share is stored once.

    config.json   "quantization_config": {"quant_method": "megpt", "version": 1,
                      "modules": {"model.layers.0.mlp.up_proj": "int4", ...},   scheme of each module
                      "shared": {"lm_head": "model.embed_tokens"},              module -> whose weight it uses
                      "reordered": ["model.layers.0.mlp.down_proj"]}            see reordered.py; absent: none
    *.safetensors <module>.weight_codes, .weight_scales, .weight_offsets, .weight_unit (and .weight_order);
                  all else as it was

`register_format()` makes plain `AutoModelForCausalLM.from_pretrained(folder)` understand such folders.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.quantization.bitsandbytes_linear import bitsandbytes_modules
from memory_efficient_gpt.quantization.description import METHOD, VERSION, read_description
from memory_efficient_gpt.quantization.folders import written_whole
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import index_experts_one_by_one, put_weight
from memory_efficient_gpt.quantization.modules import QuantizedModule
from memory_efficient_gpt.quantization.reordered import ReorderedLinear, hold_reordered
from memory_efficient_gpt.quantization.scheme import Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD_SIZE: Final = "4GB"
NOT_SAVED_BY_BITSANDBYTES: Final = (
    "weights in bitsandbytes' formats are made when a model is loaded and can't be saved by this library. "
    "Load the float checkpoint as int4 or int8 and save that; for bitsandbytes' own format load and save it "
    "with transformers alone (AutoModelForCausalLM with a BitsAndBytesConfig)."
)
_COPIED: Final = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED: Final = ("config.json", "model.safetensors.index.json")


def save_quantized(
    model: PreTrainedModel, folder: Path, *, source: Path | None = None, companions: Sequence[Any] = ()
) -> list[Path]:
    """Write `model` (quantized in place) as a folder; returns the weight files.

    source: a folder whose tokenizer, chat template and generation config are copied. companions: what
    else has a `save_pretrained`, such as a tokenizer.
    Raises ConfigError if the folder holds something already, MegptError if it can't be written; nothing is
    left of it then.
    """
    if bitsandbytes_modules(model):
        raise ConfigError([NOT_SAVED_BY_BITSANDBYTES])
    with written_whole(folder) as partial:
        _write_weights(model, partial)
        for pattern in _COPIED if source is not None else ():
            for file in cast(Path, source).glob(pattern):
                if file.name not in _NOT_COPIED:
                    shutil.copyfile(file, partial / file.name)
        for companion in companions:
            companion.save_pretrained(partial)
    return sorted(folder.glob("*.safetensors"))


def _write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Weight files, their index, config.json."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    description = describe(model)
    tensors = _without_ties(model, stored_tensors(model, description))
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for name, names in split.filename_to_tensors.items():
        save_file({n: tensors[n].contiguous() for n in names}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    if description["modules"]:  # else it is an ordinary checkpoint
        config["quantization_config"] = description
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    for name in split.filename_to_tensors:  # safetensors lets nobody else read what it writes
        shutil.copymode(folder / "config.json", folder / name)


def stored_tensors(model: nn.Module, description: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of a model quantized in place, a weight that modules share once."""
    return {n: t for n, t in model.state_dict().items() if not _is_shared(n, description["shared"])}


def describe(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model quantized in place."""
    modules: dict[str, str] = {}
    shared: dict[str, str] = {}
    reordered: list[str] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        packed = module.packed_weight
        codes = packed.codes if packed is not None else module.quantized_weight.codes
        owner = owners.setdefault(codes.data_ptr(), name)
        if owner != name:
            shared[name] = owner
        modules[name] = str(module.scheme)
        if isinstance(module, ReorderedLinear):
            reordered.append(name)
    description = {"quant_method": METHOD, "version": VERSION, "modules": modules, "shared": shared}
    return {**description, "reordered": reordered} if reordered else description


@functools.cache
def register_format() -> None:
    """Teach transformers to load folders written by `save_quantized`. Does nothing the second time."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class MegptQuantizationConfig(QuantizationConfigMixin):
        """What `describe` gives, as transformers wants it."""

        def __init__(
            self,
            modules: object = None,
            shared: object = None,
            version: object = VERSION,
            reordered: object = None,
            **_: Any,
        ) -> None:
            """Whatever the file has; `prepare_empty` checks it."""
            self.quant_method = METHOD  # type: ignore[assignment]  # transformers lists its own methods only
            self.modules, self.shared, self.version = modules, shared or {}, version
            self.reordered = reordered or []

    class MegptQuantizer(HfQuantizer):
        """Puts empty quantized modules where the checkpoint has quantized weights."""

        requires_calibration = True

        @property
        def is_trainable(self) -> bool:
            """Adapters may be trained on top."""
            return True

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            """`save_quantized` writes these models."""
            return True

        def get_state_dict_and_metadata(
            self, model: PreTrainedModel
        ) -> tuple[dict[str, Any], dict[str, str]]:
            """What transformers' `save_pretrained` writes beside config.json."""
            return stored_tensors(model, describe(model)), {}

        def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
            prepare_empty(model, vars(self.quantization_config))

        def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
            share_weights(model, cast(Any, self.quantization_config).shared)
            return model

    register_quantization_config(METHOD)(MegptQuantizationConfig)
    register_quantizer(METHOD)(MegptQuantizer)


def prepare_empty(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Make the modules that a `quantization_config` names quantized ones: their weights are not loaded yet.

    `model` may be on meta. Raises CheckpointError for what is damaged, and for modules that it does not have.
    """
    folder = str(model.config.name_or_path)
    description = read_description(settings, folder)
    modules = description.modules
    by_name = {name: layer for layer in find_layers(model) for name in layer.names}
    unknown = [name for name in modules if name not in by_name]
    if unknown:
        raise CheckpointError(
            f"{folder}: quantized modules that this architecture does not have: {', '.join(unknown[:3])}."
        )
    if any(by_name[name].role == "experts" for name in modules):
        index_experts_one_by_one(model)
    for layer in {id(by_name[name]): by_name[name] for name in modules}.values():
        weight = empty_weight(modules[layer.names[0]], layer.shape, layer.weight().device)
        if layer.name in description.reordered:
            order = torch.empty(layer.shape[1], dtype=torch.int32, device=weight.codes.device)
            hold_reordered(layer.holders[0][0], weight, order)
        else:
            put_weight(layer, weight)
    for name in description.shared:
        cast(QuantizedModule, model.get_submodule(name)).set_weight(None)
    forget_ties(model)


def share_weights(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Give modules that use another one's weight that weight."""
    for name, owner in shared.items():
        weight = cast(QuantizedModule, model.get_submodule(owner)).quantized_weight
        cast(QuantizedModule, model.get_submodule(name)).set_weight(weight)


def empty_weight(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> QuantizedWeight:
    """Tensors of the right shapes and dtypes, uninitialised."""
    n, k = shape
    rows, groups = (1, 1) if scheme.granularity == "tensor" else (n, scheme.num_groups(k))
    dtype = torch.float8_e4m3fn if scheme.kind == "fp8" else torch.uint8
    width = -(-k // 2) if scheme.bits == 4 else k

    def parameters() -> torch.Tensor:
        return torch.empty(rows, groups, dtype=torch.float16, device=device)

    return QuantizedWeight(
        scheme,
        k,
        torch.empty(n, width, dtype=dtype, device=device),
        parameters(),
        None if scheme.symmetric else parameters(),
        torch.empty((), dtype=torch.float32, device=device),
    )


def forget_ties(model: PreTrainedModel) -> None:
    """transformers ties parameters by name; quantized modules have none to tie."""
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    ties = cast("dict[str, str]", getattr(model, "all_tied_weights_keys", {}) or {})
    kept = {t: s for t, s in ties.items() if t.rpartition(".")[0] not in quantized}
    cast(Any, model).all_tied_weights_keys = kept


def _is_shared(tensor_name: str, shared: Mapping[str, str]) -> bool:
    return tensor_name.rpartition(".")[0] in shared and ".weight_" in f".{tensor_name.rpartition('.')[2]}"


def _without_ties(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop float tensors that transformers ties to another one when it loads."""
    ties = cast("dict[str, str]", getattr(model, "all_tied_weights_keys", {}) or {})
    return {name: tensor for name, tensor in tensors.items() if ties.get(name) not in tensors}
