"""Choosing codes one input after the other, each making up for the errors of those before it.

Purpose: better codes for scales and offsets that are chosen already, in plain torch, on any device.
Does not know: modules, files, where products of inputs come from.
Invariant: rows are independent; scales and offsets stay as they are.

Method (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022): of x (w - w')^T for the inputs x of a text, the expected square is (w - w') H (w - w')^T with H the
mean of x^T x. Inputs are rounded in order of falling mean square; each one's error is spread over those that
follow such that the square grows least, which rows of the Cholesky factor of H's inverse say. Groups keep
their scales, in whatever order their inputs come, so nothing is stored in another order.

Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch

from memory_efficient_gpt.quantization.storage import QuantizedWeight, pack_nibbles

logger = logging.getLogger(__name__)

DAMPING: Final = (0.01, 0.1, 1.0)
"""Shares of the mean square that are added to each input's own; more where rounding leaves H no inverse."""
PART_ELEMENTS: Final = 1 << 25
"""Of a weight that are rounded together, in whole rows."""
_AT_ONCE: Final = 128
"""Inputs whose errors are added up before they are spread over all that follow."""


def with_feedback(
    weight: torch.Tensor, quantized: QuantizedWeight, products: torch.Tensor
) -> QuantizedWeight:
    """`quantized` with other codes. weight `[N, K]`, products `[K, K] float32`: the mean of x^T x.

    Raises ValueError for products that are not finite.
    """
    scheme = quantized.scheme
    order, factor = _factor(products.to(weight.device))
    unit = quantized.unit.to(weight.device)
    steps = quantized.scales.float() * unit
    shifts = quantized.offsets.float() * unit if quantized.offsets is not None else steps * scheme.middle
    groups = order // (scheme.group_size or weight.shape[1])
    rows = max(1, PART_ELEMENTS // weight.shape[1])
    if len(steps) != len(weight):  # one scale for all
        steps, shifts = (values.expand(len(weight), -1) for values in (steps, shifts))
    codes = [
        _rounded(
            part.float()[:, order].t().contiguous(), step.t(), shift.t(), groups, factor, 2**scheme.bits - 1
        )
        for part, step, shift in zip(weight.split(rows), steps.split(rows), shifts.split(rows), strict=True)
    ]
    back = torch.argsort(order)
    chosen = torch.cat(codes, dim=1)[back].t().contiguous()
    return replace(quantized, codes=pack_nibbles(chosen) if scheme.bits == 4 else chosen)


def _rounded(
    weight: torch.Tensor, steps: torch.Tensor, shifts: torch.Tensor, groups: torch.Tensor,
    factor: torch.Tensor, most: int,
) -> torch.Tensor:  # fmt: skip
    """Codes `[K, N] uint8` of weight `[K, N] float32`, which is used up.

    steps, shifts `[G, N]`; groups `[K]`: of each input; factor `[K, K]`: U of `_factor`.
    """
    codes = torch.empty_like(weight, dtype=torch.uint8)
    own = factor.diagonal()
    for first in range(0, len(weight), _AT_ONCE):
        part = weight[first : first + _AT_ONCE]
        last = first + len(part)
        errors = torch.empty_like(part)
        for row, group in enumerate(groups[first:last].tolist()):
            step, shift = steps[group], shifts[group]
            code = torch.round((part[row] + shift) / step).clamp_(0, most)
            codes[first + row] = code.to(torch.uint8)
            errors[row] = (part[row] - (code * step - shift)) / own[first + row]
            later = factor[first + row, first + row + 1 : last]
            part[row + 1 :].addr_(later, errors[row], alpha=-1.0)
        weight[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1.0)
    return codes


def _factor(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of inputs `[K]`; U `[K, K] float32`, upper triangular: U^T U is H's inverse in that order."""
    squares = products.diagonal().float()
    mean = squares.mean()
    if not bool(torch.isfinite(mean)):
        raise ValueError("products of the layer's inputs are not finite")
    order = torch.argsort(squares, descending=True, stable=True)
    if float(mean) > 0.0:
        scaled = products[order][:, order].float() / mean
        for damping in DAMPING:
            damped = scaled.clone()
            damped.diagonal().add_(damping)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if int(failed) == 0:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if int(failed) == 0:
                    return order, upper
        logger.warning(
            "products of %d inputs have no inverse: their codes are chosen one by one", len(squares)
        )
    return order, torch.eye(len(squares), device=products.device)  # to nearest
