"""How one weight matrix is stored: a scheme and its name.

Purpose: parse and print scheme names, count their bits. No torch.
Does not know: tensors, modules, kernels.
Invariant: `parse_scheme(str(scheme)) == scheme`; a name that can be misread is refused with what would do.

    int4                4 bits, symmetric, one scale for 32 inputs     4.5 bits a weight
    int4-g128           one scale for 128 inputs                       4.125
    int4-asym-g64       a scale and an offset for 64 inputs            4.5
    int8                8 bits, symmetric, one scale an output         8 + 16 / inputs
    int8-g64, int8-asym, int8-tensor ...
    fp8                 float8 e4m3, one scale an output
    fp8-dynamic         the same; products round their inputs to e4m3, too, one scale a token
    bf16                not quantized
    bnb-nf4, bnb-fp4    bitsandbytes: 4 bits, a float32 scale for 64 weights  4.5
    bnb-nf4-dq ...      the scales quantized too                       4.127
    bnb-int8            bitsandbytes: 8 bits, a float32 scale an output  8 + 32 / inputs

Letters: N outputs, K inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal, cast

from memory_efficient_gpt.errors import ConfigError

GROUP_SIZES: Final = (32, 64, 128)
"""What can be asked for; checkpoints of other libraries may have other ones (see `can_be_stored`)."""
SCALE_BITS: Final = 16
_DEFAULT_INT4_GROUP: Final = 32
_LONGEST_SPAN: Final = 128
_BNB_BLOCK: Final = 64
_BNB_OUTER_BLOCK: Final = 256

Kind = Literal["int", "fp8", "none", "bnb-nf4", "bnb-fp4", "bnb-int8"]
Granularity = Literal["group", "channel", "tensor"]

_NAME: Final = re.compile(
    r"int(?P<bits>4|8)(?P<asym>-asym|-sym)?(?:-(?:g(?P<group>\d+)|(?P<whole>channel|tensor)))?"
)
_BNB_NAME: Final = re.compile(r"(?P<kind>bnb-(?:nf4|fp4))(?P<nested>-dq)?|bnb-int8")
_UNQUANTIZED_NAMES: Final = ("bf16", "none")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a weight `[N, K]`.

    kind: "int" (codes, scales, perhaps offsets), "fp8" (e4m3 values, one scale an output), "none", or what
    bitsandbytes stores and computes with. nested: its scales are quantized too. dynamic: products round
    their inputs to the same format, by what each token needs.
    group_size: inputs that share a scale; None unless granularity is "group".
    """

    kind: Kind
    bits: int = 16
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    nested: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        assert (self.group_size is not None) == (self.granularity == "group"), self
        assert self.kind != "int" or self.bits in (4, 8), self

    def __str__(self) -> str:
        if self.kind != "int":
            suffix = "-dq" if self.nested else "-dynamic" if self.dynamic else ""
            return "bf16" if self.kind == "none" else self.kind + suffix
        name = f"int{self.bits}" + ("" if self.symmetric else "-asym")
        if self.granularity == "tensor":
            return name + "-tensor"
        if self.granularity == "channel":
            return name + ("-channel" if self.bits == 4 else "")
        return name + ("" if self.is_default_group else f"-g{self.group_size}")

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes' own modules hold and compute with such weights."""
        return self.kind.startswith("bnb-")

    @property
    def is_default_group(self) -> bool:
        """Whether the group size is the one that its bits have when none is named."""
        return self.bits == 4 and self.group_size == _DEFAULT_INT4_GROUP

    @property
    def middle(self) -> int:
        """The code that stands for zero in a symmetric scheme."""
        return 1 << (self.bits - 1)

    def num_groups(self, num_inputs: int) -> int:
        """Scales of one output; the last group of a row may be short."""
        return math.ceil(num_inputs / self.group_size) if self.group_size else 1

    def bits_per_weight(self, num_outputs: int, num_inputs: int) -> float:
        """Stored bits by weights, scales and offsets counted, padding not."""
        if self.kind == "none":
            return 16.0
        if self.by_bitsandbytes:
            return self.bits + self._bnb_scale_bits(num_outputs, num_inputs) / (num_outputs * num_inputs)
        numbers = num_outputs * self.num_groups(num_inputs) if self.granularity != "tensor" else 1
        parameters = numbers * SCALE_BITS * (1 if self.symmetric else 2)
        return self.bits + parameters / (num_outputs * num_inputs)

    def _bnb_scale_bits(self, num_outputs: int, num_inputs: int) -> int:
        """Blocks run over the flattened weight; nested scales have a float32 scale for 256 of them."""
        if self.group_size is None:
            return 32 * num_outputs
        blocks = math.ceil(num_outputs * num_inputs / self.group_size)
        return 8 * blocks + 32 * math.ceil(blocks / _BNB_OUTER_BLOCK) if self.nested else 32 * blocks


INT4: Final = Scheme("int", 4, granularity="group", group_size=_DEFAULT_INT4_GROUP)
INT8: Final = Scheme("int", 8)
FP8: Final = Scheme("fp8", 8)
FP8_DYNAMIC: Final = Scheme("fp8", 8, dynamic=True)
BNB_INT8: Final = Scheme("bnb-int8", 8)
UNQUANTIZED: Final = Scheme("none")


def bnb_scheme(kind: Kind, *, nested: bool) -> Scheme:
    """A format of bitsandbytes with 4 bits."""
    return Scheme(kind, 4, granularity="group", group_size=_BNB_BLOCK, nested=nested)


def can_be_stored(group_size: int) -> bool:
    """Whether kernels can compute with groups of that many inputs: whole spans of 8 to 128."""
    return group_size > 0 and group_size % (8 if group_size <= _LONGEST_SPAN else _LONGEST_SPAN) == 0


def parse_scheme(name: str, *, stored: bool = False) -> Scheme:
    """The scheme of a name as the module's docstring lists them. Raises ConfigError.

    stored: of a checkpoint, whose group size need not be one of GROUP_SIZES.
    """
    text = name.strip().lower()
    if text in _UNQUANTIZED_NAMES:
        return UNQUANTIZED
    if text in ("fp8", "fp8-dynamic"):
        return FP8 if text == "fp8" else FP8_DYNAMIC
    if (bnb := _BNB_NAME.fullmatch(text)) is not None:
        kind, nested = cast("Kind | None", bnb["kind"]), bnb["nested"] is not None
        return bnb_scheme(kind, nested=nested) if kind is not None else BNB_INT8
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(
            [f"quantization scheme {name!r} is unknown. Use int4, int8, fp8, bf16, or a variant such as "
             "int4-g128, int4-asym-g64, int8-channel, int8-asym-g64, fp8-dynamic; with bitsandbytes: "
             "bnb-nf4, bnb-nf4-dq, bnb-fp4, bnb-fp4-dq, bnb-int8."]
        )  # fmt: skip
    bits, symmetric = int(match["bits"]), match["asym"] != "-asym"
    if match["whole"]:
        return Scheme("int", bits, symmetric, "tensor" if match["whole"] == "tensor" else "channel")
    group = int(match["group"]) if match["group"] else (_DEFAULT_INT4_GROUP if bits == 4 else None)
    if group is None:
        return Scheme("int", bits, symmetric)
    if not (can_be_stored(group) if stored else group in GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError([f"group size {group} in {name!r} is not supported. Use one of {sizes}."])
    return Scheme("int", bits, symmetric, "group", group)
