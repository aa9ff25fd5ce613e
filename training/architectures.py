"""The table of architectures.

Purpose: make a model from its settings, and say which weights count as embeddings.
Doesn't know: training, export.
Invariant: every architecture maps token ids [B, T] to logits [B, T, V].
"""

from collections.abc import Callable

import torch
from torch import nn

from training.gpt2 import GPT2
from training.llama import Llama
from training.settings import ModelSettings

ARCHITECTURES: dict[str, Callable[[ModelSettings], nn.Module]] = {"llama": Llama, "gpt2": GPT2}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "wpe.weight")


def make_model(model: ModelSettings, seed: int) -> nn.Module:
    """A freshly initialised model; the same seed gives the same weights.

    Raises: ValueError for an unknown architecture.
    """
    if model.architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {model.architecture!r}; known are {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    return ARCHITECTURES[model.architecture](model)


def num_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
