"""What a format of another library must tell to be loaded.

Purpose: the seam between reading a layer's tensors and building a model.
Does not know: any one format, models.
Invariant: a layer is either read exactly as its format defines it, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors
from memory_efficient_gpt.quantization.scheme import can_be_stored

Settings = Mapping[str, Any]
"""A checkpoint's `quantization_config`."""


class LayerFormat(Protocol):
    """How one library stores a quantized layer.

    title: for people. markers: tensors by which a quantized layer is known, a layer has one of them.
    own_names: tensors that a layer may have besides its bias. ignored: tensors of other modules that are left
    out, because they describe activations. notes: what users should know.
    """

    @property
    def title(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]: ...

    @property
    def own_names(self) -> frozenset[str]: ...

    @property
    def ignored(self) -> frozenset[str]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def read(self, tensors: LayerTensors, shape: tuple[int, int], class_name: str) -> RawWeight:
        """The weight `(N, K)` of a layer whose module is of class `class_name`.

        Raises CheckpointError for tensors that are missing or of another shape or dtype,
        UnsupportedModelError for options that are not supported.
        """
        ...


def setting(settings: Settings, name: str, kind: type, default: Any = None) -> Any:
    """A setting, or `default` if it is absent or null. Raises CheckpointError for one of another type."""
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"quantization_config in config.json: {name} is {value!r}, must be of type {kind.__name__}."
        )
    return value


def unsupported(title: str, what: str, value: object, remedy: str) -> UnsupportedModelError:
    """The refusal of an option that a format has and we do not."""
    return UnsupportedModelError(f"{title} checkpoint: {what} is {value!r}. {remedy}")


def check_group_size(title: str, layer: str, size: int | None) -> None:
    """Raises UnsupportedModelError for groups that kernels cannot compute with."""
    if size is not None and not can_be_stored(size):
        raise UnsupportedModelError(
            f"{title} checkpoint: group_size of {layer} is {size}. "
            "Supported are multiples of 8 up to 128, multiples of 128, and one group a row."
        )
