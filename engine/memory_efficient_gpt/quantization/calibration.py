"""What goes into each layer of a float model: mean squares of its inputs, over a text.

Purpose: second moments for the search for scales, and a text to measure on when the user gives none.
Does not know: schemes, how moments and texts are used.
Invariant: the model is left as it was; the same seed gives the same text.

Letters: B texts, T tokens of each, K inputs of a layer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.layers import Layer, find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str, float], None]

SEQUENCE_LENGTH: Final = 256
LEAST_TOKENS: Final = 64
"""Of a text: from fewer, mean squares are mostly chance."""
TOKENS_AT_ONCE: Final = 2048


def second_moments(
    model: PreTrainedModel, token_ids: torch.Tensor, *, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Mean square of each input `[K] float32` by layer name, over token_ids `[B, T] int64`.

    Layers that multiply nothing (an embedding), stacked experts, and layers that no token reached are absent.
    """
    layers = find_layers(model)
    moments = {layer.name: _Moments(layer.shape[1]) for layer in layers if multiplying_modules(layer)}
    hooks = [
        module.register_forward_pre_hook(partial(_observe, moments[layer.name]), with_kwargs=True)
        for layer in layers
        for module in multiplying_modules(layer)
    ]
    batches = token_ids.split(max(1, TOKENS_AT_ONCE // token_ids.shape[1]))
    try:
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("inputs of layers", number / len(batches))
            logits_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen.mean() for name, seen in moments.items() if seen.count}


def logits_of(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` of token_ids `[B, T]`, in the model's dtype and on its device."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=token_ids.to(model.device), use_cache=False).logits
    return logits


def self_generated(
    model: PreTrainedModel, num_tokens: int, seed: int, *, progress: Progress | None = None
) -> torch.Tensor:
    """Texts that the model itself writes, `[B, T] int64` on the CPU: at temperature 1, nothing cut off.

    T is at most `SEQUENCE_LENGTH` and the model's context; B is what makes at least `num_tokens` of them.
    """
    config = model.config.get_text_config()
    length = sequence_length(config, num_tokens)
    ids = torch.full((math.ceil(num_tokens / length), 1), first_token(config))
    generator = torch.Generator().manual_seed(seed)
    cache: Any = None
    with torch.inference_mode():
        while ids.shape[1] < length:
            if progress is not None:
                progress("writing a text", ids.shape[1] / length)
            fed = ids if cache is None else ids[:, -1:]
            out = model(input_ids=fed.to(model.device), past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            shares = out.logits[:, -1].float().softmax(-1).cpu()
            ids = torch.cat((ids, torch.multinomial(shares, 1, generator=generator)), dim=1)
    return ids


def split_text(
    config: PreTrainedConfig, token_ids: Sequence[int], *, most_tokens: int | None = None
) -> torch.Tensor:
    """Pieces of a text `[B, T] int64`, evenly spread over it if it has more than `most_tokens`.

    Each piece begins with the token that begins the text, if that is the model's begin-of-sequence token:
    models know no text without it. Raises ConfigError for fewer than `LEAST_TOKENS`.
    """
    if len(token_ids) < LEAST_TOKENS:
        raise ConfigError(
            [f"the calibration text has {len(token_ids)} tokens; at least {LEAST_TOKENS} are needed."]
        )
    start = list(token_ids[: int(token_ids[0] == config.bos_token_id)])
    body = torch.tensor(token_ids[len(start) :])
    size = min(sequence_length(config, len(token_ids)) - len(start), len(body))
    pieces = body[: len(body) // size * size].view(-1, size)
    if most_tokens is not None:
        pieces = spread(pieces, most_tokens // (size + len(start)))
    return torch.cat((torch.tensor(start, dtype=torch.long).expand(len(pieces), -1), pieces), dim=1)


def spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, at least one, evenly spread over all."""
    most = max(1, most)
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


def sequence_length(config: PreTrainedConfig, num_tokens: int) -> int:
    """Tokens of one piece: `SEQUENCE_LENGTH`, less where the context or the text is shorter."""
    context = getattr(config, "max_position_embeddings", None)
    return min(SEQUENCE_LENGTH, num_tokens, context if isinstance(context, int) else SEQUENCE_LENGTH)


def first_token(config: PreTrainedConfig) -> int:
    """The token that texts begin with: the model's begin- or end-of-sequence token, else the first one."""
    for named in (config.bos_token_id, config.eos_token_id):
        token = named[0] if isinstance(named, list | tuple) and named else named
        if isinstance(token, int):
            return token
    return 0


class _Moments:
    """Sums of squares `[K] float64` and how many inputs they are of."""

    def __init__(self, num_inputs: int) -> None:
        self.sums = torch.zeros(num_inputs, dtype=torch.float64)
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Count x `[..., K]` in."""
        flat = x.detach().reshape(-1, x.shape[-1])
        self.sums += flat.float().square().sum(0).double().cpu()
        self.count += len(flat)

    def mean(self) -> torch.Tensor:
        """`[K] float32`."""
        return (self.sums / self.count).float()


def only_input(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """What a module multiplies, however it was called."""
    x: torch.Tensor = (*inputs, *named.values())[0]
    return x


def _observe(moments: _Moments, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    moments.add(only_input(inputs, named))


def multiplying_modules(layer: Layer) -> list[nn.Module]:
    """Those that multiply their input with the layer's weight."""
    if layer.role == "experts":
        return []
    return [module for module, _ in layer.holders if not isinstance(module, nn.Embedding)]
