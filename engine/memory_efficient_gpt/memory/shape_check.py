"""Whether a checkpoint's tensors are those of its config.

Purpose: find out before anything is loaded that config.json belongs to other weights.
Does not know: quantized checkpoints; tensors that loading renames.
Invariant: headers are read, weights never. Only numbers of values are compared: loading may turn a tensor
over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.memory.weights import Architecture


def check_shapes(architecture: Architecture, files: Sequence[Path]) -> None:
    """Raises CheckpointError for the first tensor that has another size than the config gives it."""
    wanted = {name: tuple(p.shape) for name, p in architecture.model.named_parameters()}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(wanted.keys() & set(opened.keys())):
                shape = tuple(opened.get_slice(name).get_shape())
                if _count(shape) != _count(wanted[name]):
                    raise CheckpointError(
                        f"{file.name} and config.json belong to different models: {name} is {_told(shape)} "
                        f"in the file and {_told(wanted[name])} by the config. Copy both files of one model."
                    )


def _count(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _told(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one value"
