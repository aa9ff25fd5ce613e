"""Quantized modules that compute with the Triton kernels.

Purpose: say which stored weights those kernels take, convert both ways, give modules theirs.
Does not know: tiles, kernels' insides, the engine.
Invariant: Triton is imported only where it can run; a module that keeps its stored weight has a reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from memory_efficient_gpt.quantization.fp8 import keeps_one_order, multiplies_fp8
from memory_efficient_gpt.quantization.modules import QuantizedModule
from memory_efficient_gpt.quantization.scheme import Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight, pack_nibbles
from memory_efficient_gpt.triton_kernels.availability import can_overlap, triton_obstacle
from memory_efficient_gpt.triton_kernels.packing import Code, TritonWeight, obstacle, pack, unpack

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Of the norm of a product with the dequantized weight: roundings of bfloat16 results are 0.002."""


def code_of(scheme: Scheme) -> Code:
    """What the kernels call such codes."""
    return "fp8" if scheme.kind == "fp8" else "int4" if scheme.bits == 4 else "int8"


def pack_for_triton(weight: QuantizedWeight) -> TritonWeight:
    """The weight in the kernels' layout, on its device. Raises ValueError for groups they don't take."""
    code = code_of(weight.scheme)
    codes = weight.codes.view(torch.uint8) if code == "fp8" else weight.integer_codes()
    return pack(
        code, codes, weight.scales, weight.offsets, float(weight.unit), group_size=weight.scheme.group_size
    )


def multiply_packed(x: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[..., K]` times the weight transposed, plus bias `[N]`: `[..., N]`, on a device that has Triton."""
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    return quantized_linear(x, weight, bias)


def stored_layout(scheme: Scheme, packed: TritonWeight) -> QuantizedWeight:
    """The inverse of `pack_for_triton`."""
    codes, scales, offsets = unpack(packed)
    if scheme.granularity == "tensor":
        scales, offsets = scales[:1], offsets[:1] if offsets is not None else None
    if scheme.kind == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    elif scheme.bits == 4:
        codes = pack_nibbles(codes)
    unit = torch.tensor(packed.unit, device=codes.device)
    return QuantizedWeight(scheme, packed.num_inputs, codes, scales, offsets, unit)


def give_triton_kernels(model: nn.Module, *, deterministic: bool = False) -> Counter[str]:
    """Let quantized modules on CUDA devices compute with the Triton kernels.

    deterministic: a row's product may not depend on the number of rows; modules that were packed before keep
    what they were packed for.

    Counts what became of them: "triton", or the reason why torch multiplies.
    A weight shared by two modules is packed once; one module of each scheme and shape is checked against
    its dequantized weight, which also compiles the kernel for few rows.
    """
    outcome: Counter[str] = Counter()
    packed: dict[int, tuple[QuantizedWeight, TritonWeight]] = {}
    checked: dict[tuple[Scheme, int, int], str | None] = {}
    for module in model.modules():
        if not isinstance(module, QuantizedModule):
            continue
        module.deterministic = deterministic
        if module.packed_weight is not None:
            outcome["triton"] += isinstance(module.packed_weight, TritonWeight)
            continue
        weight = module.quantized_weight
        if deterministic and weight.scheme.dynamic and keeps_one_order(weight):
            outcome["triton"] += 1  # for any number of rows, with the weight as it is
            continue
        reason = _obstacle(weight)
        if reason is None:
            key = weight.codes.data_ptr()
            if key not in packed:  # the weight is kept, so that no other one gets its address
                packed[key] = weight, replace(pack_for_triton(weight), deterministic=deterministic)
            case = (weight.scheme, *weight.codes.shape)
            if case not in checked:
                checked[case] = _difference(*packed[key])
            reason = checked[case]
        if reason is None:
            module.use_triton(packed[key][1])
        outcome[reason or "triton"] += 1
    if outcome:
        logger.info(summary(outcome))
    return outcome


def summary(outcome: Counter[str]) -> str:
    """One line for a log or for GET /v1/models; empty if nothing is quantized."""
    if not outcome:
        return ""
    others = "; ".join(
        f"{count} by torch: {why}" for why, count in sorted(outcome.items()) if why != "triton"
    )
    return f"Triton kernels: {outcome['triton']} quantized" + (f"; {others}" if others else "")


def _obstacle(weight: QuantizedWeight) -> str | None:
    if (reason := triton_obstacle(weight.codes.device)) is not None:
        return reason
    if weight.scheme.dynamic:
        return _who_multiplies_fp8(weight.codes.device)
    if weight.scheme.kind not in ("int", "fp8"):
        return f"no Triton kernel for {weight.scheme}"
    return obstacle(code_of(weight.scheme), weight.scheme.group_size)


def _who_multiplies_fp8(device: torch.device) -> str:
    """With inputs that are rounded to fp8 (fp8.py)."""
    if not multiplies_fp8(device):
        return "inputs are rounded first"
    return "fp8 with fp8, but for few rows" if can_overlap(device) else "fp8 with fp8"


def _difference(weight: QuantizedWeight, packed: TritonWeight) -> str | None:
    """Why the kernels must not be used for such weights: None if their result is right."""
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    device = packed.codes.device
    ends = torch.arange(min(64, weight.num_outputs), device=device)
    some = torch.cat((ends, weight.num_outputs - 1 - ends))
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(3, weight.num_inputs, generator=generator, device=device).bfloat16()
    want = x.float() @ weight.select(some).dequantize().t()
    try:
        got = quantized_linear(x, packed)[:, some].float()
    except Exception as error:  # noqa: BLE001  # such as a GPU with less shared memory than the tile needs
        return f"the Triton kernel fails ({type(error).__name__}: {error})".splitlines()[0][:200]
    difference = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return None if difference <= TOLERANCE else f"the Triton result differs by {difference:.2g}"
