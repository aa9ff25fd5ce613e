"""Checkpoints that other libraries quantized: GPTQ, AWQ, compressed-tensors.

Purpose: load them as they are into our own layout, without those libraries.
Does not know: how weights are quantized here; the engine.
Invariant: a format's tensors are read as its definition says; an option that is not supported is refused by
name, with its value and what would do.

`format_of` recognises a checkpoint by its `quantization_config`, `load_foreign` makes the model.
"""

from __future__ import annotations

from memory_efficient_gpt.quantization.foreign.formats import LayerFormat
from memory_efficient_gpt.quantization.foreign.model_loading import format_of, load_foreign

__all__ = ["LayerFormat", "format_of", "load_foreign"]
