"""A quantized model whose own `save_pretrained`, as transformers has it, writes a folder that loads.

Purpose: give transformers' method the tensors as they are stored and the description that config.json needs.
Does not know: the layout of either (checkpoint.py).
Invariant: what the method writes is what `save_quantized` does, or it refuses; the class keeps its name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex, cast

from torch import nn

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.bitsandbytes_linear import bitsandbytes_modules
from memory_efficient_gpt.quantization.checkpoint import NOT_SAVED_BY_BITSANDBYTES, describe, stored_tensors
from memory_efficient_gpt.quantization.modules import QuantizedModule

_DESCRIPTION = "quantization_config"


def save_as_stored(model: nn.Module) -> None:
    """Let `model.save_pretrained` write weights as they are stored; nothing changes for float models.

    What transformers loaded with bitsandbytes it saves by itself.
    """
    by_bitsandbytes = bool(bitsandbytes_modules(model)) and getattr(model, "hf_quantizer", None) is None
    if by_bitsandbytes or any(isinstance(module, QuantizedModule) for module in model.modules()):
        model.__class__ = _saving(type(model))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _saving(own: Any) -> type[nn.Module]:
    if getattr(own, "saves_as_stored", False):
        return cast("type[nn.Module]", own)

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any
    ) -> None:
        """As transformers has it. Raises ConfigError for weights that bitsandbytes computes with."""
        if getattr(self, "_hf_peft_config_loaded", False):  # adapters only
            own.save_pretrained(self, save_directory, *arguments, **options)
            return
        if bitsandbytes_modules(self):
            raise ConfigError([NOT_SAVED_BY_BITSANDBYTES])
        with _described(self) as description:
            if options.get("state_dict") is None and len(arguments) < 2:
                options["state_dict"] = stored_tensors(self, description)
            options["save_original_format"] = False  # names are those of the modules that hold the codes
            own.save_pretrained(self, save_directory, *arguments, **options)

    names = {
        "__module__": own.__module__, "save_pretrained": save_pretrained, "saves_as_stored": True,
        "__reduce_ex__": _reduce,
    }  # fmt: skip
    return type(own.__name__, (own,), names)


def _reduce(model: Any, protocol: SupportsIndex) -> tuple[Any, ...]:
    """For pickle and copy, which would look for the class under its name and find transformers'."""
    (own,) = type(model).__bases__
    return _made_anew, (own,), vars(model).copy()


def _made_anew(own: Any) -> nn.Module:
    return object.__new__(_saving(own))


@contextmanager
def _described(model: Any) -> Iterator[dict[str, Any]]:
    """Within, the model's config says how the weights are stored."""
    config, description = model.config, describe(model)
    before = vars(config).get(_DESCRIPTION)
    quantizer, model.hf_quantizer = getattr(model, "hf_quantizer", None), None
    setattr(config, _DESCRIPTION, description)
    try:
        yield description
    finally:
        model.hf_quantizer = quantizer
        if before is None:
            delattr(config, _DESCRIPTION)
        else:
            setattr(config, _DESCRIPTION, before)
