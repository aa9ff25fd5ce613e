"""From a model's name to a checked checkpoint folder and a loaded transformers model.

Purpose: find the folder, check its files before anything is built, load the weights.
Does not know: KV caches, schedulers, how the model is run.
Invariant: only safetensors are read, no remote code runs, and what is damaged is refused by name.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_efficient_gpt.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from memory_efficient_gpt.tokenizer import read_eos_token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from memory_efficient_gpt.quantization.foreign import LayerFormat

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OWN_METHOD = "megpt"
_DESCRIPTIONS = ("*.json",)
_FILES = (*_DESCRIPTIONS, "*.safetensors", "*.jinja", "*.model", "*.txt")
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def bundled_models() -> dict[str, Path]:
    """The models that come with the package: name -> folder."""
    root = Path(str(resources.files("memory_efficient_gpt"))) / "bundled"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()}


def resolve_model(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The checkpoint folder of a bundled model's name, a path, or a hub id (downloaded if it must be).

    weights: False leaves those of a hub id where they are.
    Raises ModelNotFoundError saying where it looked.
    """
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelNotFoundError(
            f"model {name!r} is neither a folder nor a bundled model ({', '.join(bundled)}). "
            "Give a folder with config.json and *.safetensors, or a hub id like org/name.",
            param="model",
        )
    return _download(name, revision, _FILES if weights else _DESCRIPTIONS)


def _download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # no network, offline mode, unknown id: all say why
        raise ModelNotFoundError(
            f"model {repo_id!r} is not a folder here and could not be fetched from the hub: {error}",
            param="model",
        ) from error


def check_checkpoint(folder: Path) -> list[Path]:
    """Check config.json and every weight file's header against its size; returns the weight files.

    Takes milliseconds: it reads headers, not weights. Raises CheckpointError naming the file.
    """
    _read_json(folder / "config.json")
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        if not names:
            raise CheckpointError(f"{folder / _INDEX} lists no weight files (empty or no weight_map).")
        files = [folder / name for name in names]
    else:
        files = [folder / _SINGLE]
    missing = [str(f) for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"weight file missing: {', '.join(missing)}. Only safetensors are loaded; "
            "copy the file again or convert the checkpoint to safetensors."
        )
    for file in files:
        _check_safetensors(file)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a Hugging Face model folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object.")
    return data


def _check_safetensors(path: Path) -> None:
    """The header must parse, and its tensors fill the file to the last byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is not a safetensors file or is cut off: its header claims {length:,} bytes, "
                f"the file has {size:,}. Copy it again."
            )
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [_check_entry(path, name, entry) for name, entry in entries.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header: {error}.") from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes but its header describes {expected:,}: "
            "it is truncated or damaged. Copy it again."
        )


def _check_entry(path: Path, name: str, entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    num_bytes = _DTYPE_BYTES.get(entry["dtype"])
    for extent in entry["shape"]:
        num_bytes = None if num_bytes is None else num_bytes * int(extent)
    if begin < 0 or end < begin or (num_bytes is not None and end - begin != num_bytes):
        raise CheckpointError(
            f"{path}: tensor {name!r} takes {end - begin:,} bytes, its shape needs {num_bytes:,}."
        )
    return int(end)


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's config, of a class that transformers itself has. Raises UnsupportedModelError."""
    from transformers import AutoConfig

    raw = _read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: model_type {raw.get('model_type')!r} cannot be loaded: "
            f"{_first_line(error)}"
        ) from error
    text_config: PreTrainedConfig = config.get_text_config()
    return text_config


def load_model(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model with its weights on `device`, in eval mode, nothing requiring gradients.

    Raises CheckpointError when weights are missing or have other shapes than the config says.
    """
    from transformers.utils import logging as transformers_logging

    from memory_efficient_gpt.weight_memory import apart

    transformers_logging.disable_progress_bar()  # loads have a bar of their own
    try:
        with apart(device):
            model, report = _from_pretrained(folder, config, dtype, device)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {_first_line(error)}") from error
    _refuse_incomplete(folder, report)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    if quantization_settings(folder) is not None:
        from memory_efficient_gpt.quantization.without_parameters import describe_itself

        describe_itself(loaded)
    return loaded


def _from_pretrained(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of what it found in the files."""
    from transformers import AutoModelForCausalLM

    if (layer_format := _foreign_format(folder)) is not None:
        from memory_efficient_gpt.quantization.foreign import load_foreign

        return load_foreign(check_checkpoint(folder), layer_format, config, dtype=dtype, device=device)
    from memory_efficient_gpt.quantization import bitsandbytes

    settings = quantization_settings(folder)
    by_bitsandbytes = bitsandbytes.describes(settings)
    if by_bitsandbytes:
        bitsandbytes.require(to_load=True)
    if getattr(config, "quantization_config", None) is not None:
        from memory_efficient_gpt.quantization.checkpoint import register_format

        register_format()
    if device.type != "cpu" and (settings is None or settings.get("quant_method") == _OWN_METHOD):
        straight = _read_if_possible(folder, config, dtype, device)
        if straight is not None:
            return straight
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its annotations miss output_loading_info
    loaded: tuple[PreTrainedModel, dict[str, Any]] = from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map={"": device} if by_bitsandbytes or device.type != "cpu" else None,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if by_bitsandbytes:
        bitsandbytes.adopt(loaded[0], dtype)
    return loaded


def _read_if_possible(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """`read_to_device`; None, and the log says why, where only transformers' own way is left."""
    from memory_efficient_gpt.file_tensors import obstacle

    reason = obstacle(check_checkpoint(folder))
    if reason is None:
        try:
            return read_to_device(folder, config, dtype, device)
        except (AttributeError, TypeError) as error:  # another transformers may ask more of a tensor
            reason = _first_line(error)
    logger.warning("%s: files can't be read straight to %s: %s", folder, device, reason)
    return None


def read_to_device(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As transformers loads a folder, from tensors that are on `device` when it asks for them.

    Raises CheckpointError for a file that has changed meanwhile, and whatever transformers raises.
    """
    from transformers import GenerationConfig

    from memory_efficient_gpt.file_tensors import file_tensors
    from memory_efficient_gpt.kv_cache.geometry import causal_model_class

    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    kind: Any = causal_model_class(config)
    with file_tensors(check_checkpoint(folder), device) as tensors:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            None,
            config=config,
            dtype=dtype,
            device_map={"": device},
            state_dict=tensors,
            generation_config=generation,
            output_loading_info=True,
        )
    loaded[0].name_or_path = loaded[0].config.name_or_path = str(folder)
    return loaded


def quantization_notes(folder: Path) -> tuple[str, ...]:
    """What a user should know of a checkpoint that another library quantized.

    Raises UnsupportedModelError for options of its format that cannot be loaded.
    """
    layer_format = _foreign_format(folder)
    return layer_format.notes if layer_format is not None else ()


def _foreign_format(folder: Path) -> LayerFormat | None:
    """The format of another library in which the weights are; None if they are in none."""
    if (settings := quantization_settings(folder)) is None:
        return None
    from memory_efficient_gpt.quantization.foreign import format_of

    return format_of(settings)


def quantization_settings(folder: Path) -> dict[str, Any] | None:
    """What config.json says of how weights are quantized; None if nothing."""
    raw = _read_json(folder / "config.json")
    for part in (raw, raw.get("text_config")):  # models with other modalities have a config for text
        for name in ("quantization_config", "compression_config"):
            settings = part.get(name) if isinstance(part, dict) else None
            if isinstance(settings, dict):
                return settings
    return None


def resolve_dtype(
    wanted: str, config: PreTrainedConfig, device: torch.device
) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype to compute in, and what a user should know of the choice. "auto" is the checkpoint's own."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted), ()
    stored: Any = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if stored == torch.float16 and device.type == "cpu":
        return torch.bfloat16, ("float16 weights are computed in bfloat16 on a CPU",)
    if stored in (torch.bfloat16, torch.float16, torch.float32):
        return stored, ()
    return torch.float32, (f"the checkpoint names no usable dtype ({stored}); float32 is used",)


def eos_token_ids(model: PreTrainedModel, folder: Path | None) -> tuple[int, ...]:
    """The tokens that end a text: what the checkpoint's files name, else what the model's configs do."""
    found = read_eos_token_ids(folder) if folder is not None else ()
    sources = (getattr(model, "generation_config", None), model.config.get_text_config())
    named = (getattr(source, "eos_token_id", None) for source in sources)
    own: int | list[int] | None = next((ids for ids in named if ids is not None), None)
    if found or own is None:
        return found
    return tuple(own) if isinstance(own, list | tuple) else (int(own),)


def _refuse_incomplete(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights that config.json asks for are not in the files: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )
    if report.get("mismatched_keys"):
        some = sorted(report["mismatched_keys"])[:3]
        raise CheckpointError(f"{folder}: weights have other shapes than config.json says: {some}.")
    unexpected: Sequence[str] = sorted(report.get("unexpected_keys", ()))
    if unexpected:
        logger.warning("%s: %d weights are not used by this architecture", folder, len(unexpected))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
