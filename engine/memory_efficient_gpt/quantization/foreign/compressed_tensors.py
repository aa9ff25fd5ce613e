"""compressed-tensors checkpoints (llm-compressor): pack-quantized, naive-, int- and float-quantized weights.

Purpose: read a layer's tensors as the scheme of its config group defines them.
Does not know: models; how activations are quantized there (here they are computed in our way).
Invariant: what a scheme says and what a tensor is must agree, else the tensor is named.

    weight_packed      [N, ceil(K b / 32)] int32  code + 2^(b-1), b bits each, lowest bits first   (b 2, 4, 8)
    weight             [N, K] int8 or float8_e4m3fn                                   where not packed
    weight_scale       [1], [N, 1] or [N, G]
    weight_zero_point  as weight_scale in int8; packed ones [ceil(N b / 32), G] int32 down the columns
    weight_g_idx       [K] int32, the group of each input; -1 or absent: k // group_size
    weight_shape       [2] int64, (N, K) before packing

    weight[n, k] = weight_scale[n, g] * (code[n, k] - weight_zero_point[n, g])

Letters: N outputs, K inputs, G groups, b bits of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.quantization.foreign.bit_streams import nibbles_of, unpack_words, words_of
from memory_efficient_gpt.quantization.foreign.config_groups import TITLE, ConfigGroups, WeightScheme
from memory_efficient_gpt.quantization.foreign.formats import Settings, check_group_size, setting, unsupported
from memory_efficient_gpt.quantization.foreign.group_order import order_of_groups
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight, pack_codes, widen
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors

_FLOATS: Final = ("F16", "BF16", "F32")
_INTEGERS: Final = ("I8", "I32", "I64")
_WEIGHTS: Final = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
)  # fmt: skip
_ACTIVATIONS: Final = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_CACHE: Final = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The format with a checkpoint's config groups."""

    groups: ConfigGroups
    title: str = TITLE
    markers: tuple[str, ...] = ("weight_packed", "weight_scale")
    own_names: frozenset[str] = frozenset((*_WEIGHTS, *_ACTIVATIONS))
    ignored: frozenset[str] = frozenset(_CACHE)

    @property
    def notes(self) -> tuple[str, ...]:
        """What became of quantized activations and caches."""
        return (f"weights read from a checkpoint in {TITLE} format", *self.groups.notes)

    def read(self, tensors: LayerTensors, shape: tuple[int, int], class_name: str) -> RawWeight:
        """See `LayerFormat.read`."""
        n, k = shape
        scheme = self.groups.scheme_of(tensors, class_name)
        check_group_size(TITLE, tensors.name, scheme.group_size)
        groups = -(-k // scheme.group_size) if scheme.group_size else 1
        size = scheme.group_size if groups > 1 else None
        scales = _parameters(tensors, "weight_scale", scheme, n, groups, _FLOATS)
        if scheme.is_float:
            return RawWeight(k, 8, tensors.read("weight", ("F8_E4M3",), [shape]), scales, None)
        zeros = _zeros(tensors, scheme, n, groups).expand_as(scales).contiguous()
        order, size = _order(tensors, k, groups, size)
        codes = _codes(tensors, scheme.num_bits, shape, order)
        bits = 8 if scheme.num_bits == 8 else 4
        return RawWeight(k, bits, codes, scales, widen(zeros, scheme.num_bits), size, order)


def _codes(
    tensors: LayerTensors, bits: int, shape: tuple[int, int], order: torch.Tensor | None
) -> torch.Tensor:
    """Codes from 0 up, as QuantizedWeight keeps them."""
    n, k = shape
    if "weight_packed" not in tensors:
        signed = tensors.read("weight", ("I8",), [shape])
        codes = (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        if bits < 8 and int(codes.max()) >> bits:
            raise tensors.error("weight", f"holds values beyond {bits} bits")
    else:
        if "weight_shape" in tensors:
            stated = tuple(tensors.read("weight_shape", ("I64", "I32"), [(2,)]).tolist())
            if stated != shape:
                raise tensors.error("weight_shape", f"is {list(stated)}, the model's layer is {list(shape)}")
        words = tensors.read("weight_packed", ("I32",), [(n, words_of(k, bits))])
        if bits == 4 and order is None:
            return nibbles_of(words, k)
        codes = unpack_words(words, bits, k)
    codes = widen(codes, bits)
    return pack_codes(codes if order is None else codes[:, order], max(bits, 4))


def _parameters(
    tensors: LayerTensors, own_name: str, scheme: WeightScheme, n: int, groups: int, dtypes: tuple[str, ...]
) -> torch.Tensor:
    """Scales or zero points: `[1, 1]`, `[N, 1]` or `[N, G]`."""
    if scheme.per_tensor:
        return tensors.read(own_name, dtypes, [(1,), (), (1, 1)]).reshape(1, 1)
    one_a_row = [(n,)] if groups == 1 else []
    return tensors.read(own_name, dtypes, [(n, groups), *one_a_row]).reshape(n, groups)


def _zeros(tensors: LayerTensors, scheme: WeightScheme, n: int, groups: int) -> torch.Tensor:
    """Zero points as codes from 0 up, uint8."""
    bits, own_name = scheme.num_bits, "weight_zero_point"
    middle = 1 << (bits - 1)
    if scheme.symmetric:
        return torch.full((1, 1), middle, dtype=torch.uint8)
    packed = (words_of(n, bits), groups)
    if tensors.dtype(own_name) == "I32" and tensors.shape(own_name) == packed:
        return unpack_words(tensors.read(own_name, ("I32",)).t(), bits, n).t().contiguous()
    signed = _parameters(tensors, own_name, scheme, n, groups, _INTEGERS).to(torch.int16)
    if signed.min() < -middle or signed.max() >= middle:
        raise tensors.error(own_name, f"holds values beyond {bits} bits")
    return (signed + middle).to(torch.uint8)


def _order(
    tensors: LayerTensors, k: int, groups: int, size: int | None
) -> tuple[torch.Tensor | None, int | None]:
    """As `order_of_groups`; -1 everywhere stands for no order."""
    if "weight_g_idx" not in tensors:
        return None, size
    index = tensors.read("weight_g_idx", ("I32", "I64"), [(k,)]).long()
    return (None, size) if (index == -1).all() else order_of_groups(tensors, "weight_g_idx", index, groups)


def read_settings(settings: Settings) -> CompressedTensors:
    """Raises UnsupportedModelError for sparse weights, transforms, and formats that are not listed above."""
    sparsity = setting(settings, "sparsity_config", dict, {}).get("format", "dense")
    if sparsity != "dense":
        raise unsupported(TITLE, "sparsity_config.format", sparsity, "Supported is dense: decompress it.")
    if transforms := setting(settings, "transform_config", dict, {}).get("config_groups"):
        names = sorted(transforms)
        raise unsupported(TITLE, "transform_config.config_groups", names, "Quantize without transforms.")
    return CompressedTensors(ConfigGroups.parse(settings))
