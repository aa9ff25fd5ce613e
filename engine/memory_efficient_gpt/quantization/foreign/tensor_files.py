"""The tensors of a checkpoint's safetensors files by name, each read when it is asked for.

Purpose: find tensors, check shape and dtype by the header before a byte is read, name file and tensor if not.
Does not know: what the tensors mean, models.
Invariant: nothing stays in memory here; a tensor that was read lives as long as its caller keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from memory_efficient_gpt.errors import CheckpointError


class TensorFiles:
    """Open safetensors files. Use as a context manager."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._homes: dict[str, Path] = {}
        for path in files:
            try:
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise CheckpointError(f"{path} cannot be read: {error}. Copy it again.") from error
            self._homes.update(dict.fromkeys(self._files[path].keys(), path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._homes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """By the file's header."""
        return tuple(self._files[self._homes[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """By the file's header, as safetensors writes it: "I32", "F16", "F8_E4M3"."""
        return str(self._files[self._homes[name]].get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """The tensor; its memory may be the file's, mapped. Raises CheckpointError naming file and tensor."""
        path = self._homes[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}. Copy the file again.") from error
        return tensor


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of one quantized layer. name: of its module in the files; marker: a tensor that it has."""

    files: TensorFiles
    name: str
    marker: str

    @property
    def path(self) -> Path:
        """The file with the layer's main tensor."""
        return self.files.path(f"{self.name}.{self.marker}")

    def __contains__(self, own_name: str) -> bool:
        return f"{self.name}.{own_name}" in self.files

    def shape(self, own_name: str) -> tuple[int, ...]:
        """By the file's header. Raises CheckpointError for a tensor that is missing."""
        return self.files.shape(self._found(own_name))

    def dtype(self, own_name: str) -> str:
        """By the file's header. Raises CheckpointError for a tensor that is missing."""
        return self.files.dtype(self._found(own_name))

    def read(
        self, own_name: str, dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]] | None = None
    ) -> torch.Tensor:
        """A tensor of one of `dtypes` and `shapes` (None: any). Raises CheckpointError for any other."""
        name = self._found(own_name)
        dtype, shape = self.files.dtype(name), self.files.shape(name)
        if dtype not in dtypes:
            raise self.error(own_name, f"is {dtype}, must be {' or '.join(dtypes)}")
        if shapes is not None and shape not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise self.error(own_name, f"has shape {list(shape)}, must have {expected}")
        return self.files.read(name)

    def error(self, own_name: str, problem: str) -> CheckpointError:
        """What is wrong with a tensor, for people."""
        name = f"{self.name}.{own_name}"
        path = self.files.path(name) if name in self.files else self.path
        return CheckpointError(f"{path}: {name} {problem}.")

    def _found(self, own_name: str) -> str:
        name = f"{self.name}.{own_name}"
        if name not in self.files:
            raise self.error(own_name, f"is missing, {self.name}.{self.marker} is there")
        return name
