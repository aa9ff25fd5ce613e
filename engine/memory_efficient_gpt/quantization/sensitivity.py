"""How much a model's predictions change when one group of layers is stored less precisely.

Purpose: for each group and scheme, the weights' error and the divergence from the float model it causes.
Does not know: budgets, files, how a text was made.
Invariant: after measuring, the model's weights are bit for bit what they were; beyond the model, memory holds
one group's weights and the float model's predictions on the text.

The divergence is the Kullback-Leibler divergence of the model's next-token distributions from the float
model's, in nats per token. Measured for one scheme of each group, it is carried over to others by their
weights' errors t^2, because it is nearly linear in them (Malinovskii et al., "Pushing the Limits of Large
Language Model Quantization via the Linearity Theorem", 2025, theorem 1). t^2 is the squared error relative to
the weights' squares, both weighted by the inputs' mean squares.

Letters: B texts, T tokens of each, N outputs, K inputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.quantization.calibration import Progress, logits_of, spread
from memory_efficient_gpt.quantization.groups import LayerGroup
from memory_efficient_gpt.quantization.layers import Layer
from memory_efficient_gpt.quantization.modules import QuantizedConv1D
from memory_efficient_gpt.quantization.rounding import Rounding, quantize_weight, rounding_of
from memory_efficient_gpt.quantization.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_TOKENS: Final = 1024
"""Twice as many tell groups apart no better: which scheme a group gets hardly ever changes."""
REFERENCE_BYTES: Final = 2**30
LOGIT_BYTES_AT_ONCE: Final = 2**27


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scheme for one group. bits: stored ones; error: t^2; divergence: nats per token."""

    scheme: Scheme
    bits: int
    error: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What schemes do to a group. per_error: nats per token for each unit of t^2, None if not measured."""

    group: LayerGroup
    per_error: float | None
    candidates: tuple[Candidate, ...]


class Reference:
    """The float model's predictions on token_ids `[B, T]`, to compare the changed model with."""

    def __init__(
        self, model: PreTrainedModel, token_ids: torch.Tensor, *, most_tokens: int = MEASURED_TOKENS
    ) -> None:
        """Some of the texts: of `most_tokens` and of `REFERENCE_BYTES` of log-probabilities, at least one.

        Others are `unmeasured` `[B, T]`, for what must not be judged by the text that it was made with: the
        whole text, if others are fewer than those measured (`measures_others` is False then).
        """
        self.model = model
        row_bytes = 4 * token_ids.shape[1] * model.config.get_text_config().vocab_size
        most = min(most_tokens // token_ids.shape[1], REFERENCE_BYTES // row_bytes)
        chosen = spread(torch.arange(len(token_ids)), most)
        others = torch.ones(len(token_ids), dtype=torch.bool).index_fill_(0, chosen, False)
        self.measures_others = int(others.sum()) >= len(chosen)
        self.unmeasured = token_ids[others] if self.measures_others else token_ids
        token_ids = token_ids[chosen]
        self.batches = token_ids.split(max(1, LOGIT_BYTES_AT_ONCE // row_bytes))
        self.log_probs = [self._log_probs(batch) for batch in self.batches]

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""
        return sum(batch.numel() for batch in self.batches)

    def divergence(self) -> float:
        """Nats per token by which the model, as it is now, differs from what it was."""
        total = 0.0
        for batch, want in zip(self.batches, self.log_probs, strict=True):
            got = self._log_probs(batch)
            total += float(functional.kl_div(got, want, reduction="sum", log_target=True))
        return max(0.0, total / self.num_tokens)  # rounding can make nothing look like less than nothing

    def _log_probs(self, batch: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model, batch).float().log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How weights will be quantized; measured is what will be done."""

    rounding: Rounding = "search"
    importances: Mapping[str, torch.Tensor] | None = None
    kernels: Kernels | None = None

    def __call__(self, layer: Layer, scheme: Scheme) -> tuple[torch.Tensor, float, float]:
        """The dequantized weight `[N, K]`, its squared error and its square, weighted."""
        weight, importance = layer.weight(), (self.importances or {}).get(layer.name)
        dequantized = quantize_weight(
            weight,
            scheme,
            rounding=rounding_of(scheme, self.rounding),
            importance=importance,
            kernels=self.kernels,
        ).dequantize(weight.dtype)
        counts = 1.0 if importance is None else importance.to(weight.device)
        error = ((dequantized.float() - weight.float()).square() * counts).sum()
        return dequantized, float(error), float((weight.float().square() * counts).sum())


def measure(
    reference: Reference,
    groups: Sequence[LayerGroup],
    options: Sequence[Scheme],
    quantizer: Quantizer | None = None,
    *,
    exact: bool = False,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """The sensitivity of every group to every option (a pinned group: to its scheme).

    exact: run the model for every option instead of for the one with the largest error only.
    """
    quantizer = quantizer or Quantizer()
    measured = []
    for number, group in enumerate(groups):
        if progress is not None:
            progress(group.name, number / len(groups))
        measured.append(_measure_group(reference, group, group.schemes(options), quantizer, exact=exact))
    return measured


def _measure_group(
    reference: Reference, group: LayerGroup, schemes: Sequence[Scheme], quantizer: Quantizer, *, exact: bool
) -> Sensitivity:
    errors: dict[Scheme, float] = {}
    divergences: dict[Scheme, float] = {}
    coarsest: list[torch.Tensor] = []
    for scheme in schemes:
        if scheme.kind == "none":
            errors[scheme] = divergences[scheme] = 0.0
            continue
        weights, error = _quantized(group, scheme, quantizer)
        if exact:
            with replaced_weights(group.layers, weights):
                divergences[scheme] = reference.divergence()
        elif error > max(errors.values(), default=-1.0):
            coarsest = weights
        errors[scheme] = error
    worst = max(schemes, key=lambda scheme: errors[scheme])
    if coarsest:
        with replaced_weights(group.layers, coarsest):
            divergences[worst] = reference.divergence()
    per_error = divergences[worst] / errors[worst] if errors[worst] else None
    candidates = (
        Candidate(s, group.stored_bits(s), errors[s], divergences.get(s, (per_error or 0.0) * errors[s]))
        for s in schemes
    )
    return Sensitivity(group, per_error, tuple(candidates))


def _quantized(group: LayerGroup, scheme: Scheme, quantizer: Quantizer) -> tuple[list[torch.Tensor], float]:
    """The group's dequantized weights and their t^2."""
    results = [quantizer(layer, scheme) for layer in group.layers]
    square = sum(square for _, _, square in results)
    return [weight for weight, _, _ in results], sum(e for _, e, _ in results) / square if square else 0.0


@contextmanager
def replaced_weights(layers: Sequence[Layer], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let `layers` compute with other weights `[N, K]` for a while; their own come back untouched."""
    parameters = [layer.holders[0][0].get_parameter(layer.parameter or "weight") for layer in layers]
    kept = [parameter.data for parameter in parameters]
    try:
        for layer, parameter, weight in zip(layers, parameters, weights, strict=True):
            transposed = layer.holders[0][1] is QuantizedConv1D
            parameter.data = weight.t().contiguous() if transposed else weight.reshape(parameter.shape)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
