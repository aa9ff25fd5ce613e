"""Products of each layer's inputs with each other, over a text: what `feedback.py` wants to know of a layer.

Purpose: run a model on a text and add up, for some layers at a time: products may take more than the model.
Does not know: schemes, codes.
Invariant: the model is left as it was. Layers that get the very same input (queries, keys, values) share
products.

Letters: B texts, T tokens of each, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from memory_efficient_gpt.hardware import free_memory_bytes
from memory_efficient_gpt.quantization.calibration import (
    TOKENS_AT_ONCE,
    logits_of,
    multiplying_modules,
    only_input,
)
from memory_efficient_gpt.quantization.layers import Layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, float], None]

_MEMORY_SHARE: Final = 0.25
_LEAST_BYTES: Final = 1 << 30
_ALIKE: Final = 4.0
"""Tokens of a text are not drawn independently: so many tell what one would. Measured on `demo`, whose 4-bit
weights from 256 tokens of one text are better than searched ones with it, and not without."""


class InputProducts:
    """Those of a model's layers, in the order in which the layers are asked for.

    layers: in that order. token_ids `[B, T] int64`. most_bytes: that products may take together; None: a
    share of what is free on the model's device.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[Layer], token_ids: torch.Tensor,
        most_bytes: int | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._model, self._layers, self._token_ids, self._progress = model, list(layers), token_ids, progress
        free = int(_MEMORY_SHARE * free_memory_bytes(model.device))
        self._most_bytes = most_bytes if most_bytes is not None else max(_LEAST_BYTES, free)
        self._found: dict[str, torch.Tensor | None] = {}

    def of(self, layer: Layer) -> torch.Tensor | None:
        """The mean of x^T x `[K, K] float32` on the model's device, as well as so many tokens tell it.

        It is forgotten here. None if no token reached the layer or nothing multiplies with it (an embedding,
        stacked experts).
        """
        if layer.name not in self._found:
            self._found = self._run(self._next(layer))
        return self._found.pop(layer.name)

    def _next(self, first: Layer) -> list[Layer]:
        """From that layer on, as many as there is room for."""
        start = next(i for i, layer in enumerate(self._layers) if layer.name == first.name)
        chosen, size = [first], 4 * first.shape[1] ** 2
        for layer in self._layers[start + 1 :]:
            size += 4 * layer.shape[1] ** 2
            if size > self._most_bytes:
                break
            chosen.append(layer)
        return chosen

    def _run(self, layers: Sequence[Layer]) -> dict[str, torch.Tensor | None]:
        sums: dict[str, _Sum] = {}
        seen = _Seen()
        hooks = [
            module.register_forward_pre_hook(partial(_observe, seen, sums, layer.name), with_kwargs=True)
            for layer in layers
            for module in multiplying_modules(layer)
        ]
        batches = self._token_ids.split(max(1, TOKENS_AT_ONCE // self._token_ids.shape[1])) if hooks else ()
        try:
            for number, batch in enumerate(batches):
                if self._progress is not None:
                    self._progress("inputs of layers", number / len(batches))
                logits_of(self._model, batch)
                seen.forget()
        finally:
            for hook in hooks:
                hook.remove()
        means: dict[int, torch.Tensor] = {}
        for total in sums.values():
            if total.count and id(total) not in means:
                means[id(total)] = total.shrunk()
        return {layer.name: means.get(id(sums.get(layer.name))) for layer in layers}


class _Sum:
    """x^T x added up, how many x, and the squares of what is off the diagonal of each x^T x."""

    def __init__(self, like: torch.Tensor) -> None:
        self.products = torch.zeros(like.shape[-1], like.shape[-1], device=like.device)
        self.squares = 0.0
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Count x `[..., K]` in."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.products.addmm_(flat.t(), flat)
        own = flat.square()
        self.squares += float((own.sum(1).double().square() - own.square().sum(1)).sum())
        self.count += len(flat)

    def shrunk(self) -> torch.Tensor:
        """The mean, off its diagonal as much smaller as chance makes it larger; the sums are used up.

        From few tokens inputs seem to go together that don't: the share to take off is the expected square of
        that by the square of what was found (Ledoit and Wolf, "A well-conditioned estimator for
        large-dimensional covariance matrices", 2004, with the diagonal as the target).
        """
        with torch.inference_mode():
            mean = self.products.div_(self.count)
            diagonal = mean.diagonal().clone()
            found = float(mean.square().sum(dtype=torch.float64) - diagonal.double().square().sum())
            chance = _ALIKE * (self.squares / self.count - found) / self.count
            mean.mul_(1.0 - min(1.0, max(0.0, chance / found)) if found > 0.0 else 1.0)
            mean.diagonal().copy_(diagonal)
        return mean


class _Seen:
    """The input that was counted last, and where."""

    def __init__(self) -> None:
        self.input: torch.Tensor | None = None
        self.total: _Sum | None = None

    def forget(self) -> None:
        self.input = self.total = None


def _observe(
    seen: _Seen, sums: dict[str, _Sum], name: str, module: nn.Module, inputs: tuple[Any, ...],
    named: dict[str, Any],
) -> None:  # fmt: skip
    x = only_input(inputs, named)
    if x is seen.input and seen.total is not None and sums.get(name, seen.total) is seen.total:
        sums[name] = seen.total  # counted already
        return
    total = sums.setdefault(name, _Sum(x))
    total.add(x)
    seen.input, seen.total = x, total
