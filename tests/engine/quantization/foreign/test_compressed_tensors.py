"""compressed-tensors layers against the format's definition: strategies, dtypes, targets, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
from memory_efficient_gpt.quantization.reordered import ReorderedLinear
from tests.engine.quantization.foreign import packers
from tests.engine.quantization.foreign.folders import (
    LLAMA_LAYERS,
    Tensors,
    change_config,
    change_tensors,
    close_to,
    load,
    write,
)

LAYER = "model.layers.0.mlp.up_proj"
GROUPS = {"group": 16, "channel": None, "tensor": None}


def settings(
    weights: dict[str, Any], *, targets: tuple[str, ...] = ("Linear",), **fields: Any
) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group}, **fields,
    }  # fmt: skip


def args(bits: int = 4, strategy: str = "group", *, symmetric: bool = True, **fields: Any) -> dict[str, Any]:
    size = GROUPS[strategy]
    return {
        "num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "group_size": size,
        "dynamic": False, **fields,
    }  # fmt: skip


def write_integers(
    folder: Path,
    bits: int = 4,
    strategy: str = "group",
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Tensors:
    def quantize(weight: torch.Tensor) -> packers.Grouped:
        if strategy != "tensor":
            return packers.quantize(
                weight, bits=bits, group=GROUPS[strategy], symmetric=symmetric, scale_dtype=scale_dtype
            )
        row = packers.quantize(weight.reshape(1, -1), bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
        return packers.Grouped(
            row.codes.view(weight.shape), row.scales, row.zeros, torch.zeros(weight.shape[1]).long(), bits
        )

    def pack(weight: packers.Grouped) -> Tensors:
        packed_zeros = strategy != "tensor" and options.get("packed_zeros", True)
        return packers.compressed_tensors(
            weight, packed=options.get("packed", True), symmetric=symmetric, packed_zeros=packed_zeros
        )

    return write(folder, "llama", settings(args(bits, strategy, symmetric=symmetric)), quantize, pack)


def check(model: Any, expected: Tensors, *, exact: bool = False) -> None:
    for name, want in expected.items():
        module = model.get_submodule(name)
        weight = module.quantized_weight
        largest = float(weight.offsets.abs().max() * weight.unit) if weight.offsets is not None else 0.0
        assert close_to(module.dequantize(torch.float64), want, 0.0 if exact else largest), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_the_definition(
    tmp_path: Path, bits: int, strategy: str, symmetric: bool, packed: bool
) -> None:
    expected = write_integers(tmp_path, bits, strategy, symmetric=symmetric, packed=packed)
    check(load(tmp_path), expected, exact=symmetric or strategy == "tensor")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = write_integers(tmp_path, scale_dtype=dtype)
    model = load(tmp_path)
    for name, want in expected.items():
        got = model.get_submodule(name).dequantize(torch.float64)
        rounding = 0.0 if dtype is torch.float16 else 2.0**-11  # of scales to float16
        assert ((got - want).abs() <= rounding * want.abs() * 1.001 + 1e-12).all(), name


def test_zero_points_may_be_unpacked(tmp_path: Path) -> None:
    expected = write_integers(tmp_path, symmetric=False, packed_zeros=False)
    check(load(tmp_path), expected)


@pytest.mark.parametrize("shuffled", [True, False])
def test_an_index_of_groups_is_followed_and_minus_one_is_none(tmp_path: Path, shuffled: bool) -> None:
    def quantize(weight: torch.Tensor) -> packers.Grouped:
        index = torch.arange(weight.shape[1]) // 16
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(2))
        return packers.quantize(weight, index=index[order] if shuffled else index)

    def pack(weight: packers.Grouped) -> Tensors:
        index = weight.index if shuffled else torch.full_like(weight.index, -1)
        return packers.compressed_tensors(weight) | {"weight_g_idx": index.int()}

    expected = write(tmp_path, "llama", settings(args()), quantize, pack)
    model = load(tmp_path)
    check(model, expected, exact=True)
    assert isinstance(model.get_submodule(LAYER), ReorderedLinear) == shuffled


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_weights_are_the_definition(tmp_path: Path, strategy: str, dtype: torch.dtype) -> None:
    stored: Tensors = {}

    def quantize(weight: torch.Tensor) -> packers.Grouped:
        largest = (
            weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max().view(1, 1)
        )
        scales = (largest / 448).to(dtype)
        codes = (weight / scales.float()).to(torch.float8_e4m3fn)
        zeros = torch.zeros_like(scales)
        return packers.Grouped(codes, scales, zeros, torch.zeros(weight.shape[1]).long(), 8)

    def pack(weight: packers.Grouped) -> Tensors:
        scales = weight.scales if strategy == "channel" else weight.scales.view(1)
        return {"weight": weight.codes, "weight_scale": scales, "input_scale": torch.ones(1)}

    fp8 = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    stored = write(tmp_path, "llama", settings(fp8, format="float-quantized"), quantize, pack)
    model = load(tmp_path)
    exact = strategy == "tensor" or dtype is torch.bfloat16
    for name, want in stored.items():
        module = model.get_submodule(name)
        assert str(module.scheme) == "fp8"
        limit = want.abs() * (1e-7 if exact else 2.0**-11 * 1.001)
        assert ((module.dequantize(torch.float64) - want).abs() <= limit).all(), name


def test_the_most_specific_target_decides(tmp_path: Path) -> None:
    bits = {"q_proj": 8, "up_proj": 2}

    def pack(weight: packers.Grouped) -> Tensors:
        return packers.compressed_tensors(weight)

    layers = iter(sorted(f"{n}.self_attn.{p}" if p[0] in "qkvo" else f"{n}.mlp.{p}"
                         for n in (0, 1) for p in LLAMA_LAYERS))  # fmt: skip

    def quantize(weight: torch.Tensor) -> packers.Grouped:
        layer = next(layers)
        width = bits.get(layer.rpartition(".")[2], 4) if layer.startswith("0") else 4
        return packers.quantize(weight, bits=width, group=16)

    groups = {
        "group_0": {"targets": ["Linear"], "weights": args(4)},
        "group_1": {"targets": [r"re:.*layers\.0\.self_attn\.q.*", "re:.*up_proj"], "weights": args(8)},
        "group_2": {"targets": [LAYER], "weights": args(2)},
        "group_3": {"targets": ["model.layers.1.mlp.up_proj"], "weights": args(4)},
    }
    expected = write(tmp_path, "llama", settings(args()) | {"config_groups": groups}, quantize, pack)
    check(load(tmp_path), expected, exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format is 'marlin-24'. Supported are dense, pack-quantized"),
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format is 'sparse-24-bitmask'",
        ),
        ({"transform_config": {"config_groups": {"u": {}}}}, r"transform_config.config_groups is \['u'\]"),
    ],
)
def test_formats_that_are_not_supported_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_integers(tmp_path)
    change_config(tmp_path, settings(args(), **change))
    with pytest.raises(UnsupportedModelError, match=f"compressed-tensors checkpoint: {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, "weights.num_bits is 3. Supported are 2, 4 and 8"),
        ({"num_bits": 4, "type": "float"}, "weights.num_bits is 4. Supported is 8"),
        ({"strategy": "block"}, "weights.strategy is 'block'. Supported are tensor, channel, group"),
        ({"num_bits": 8, "type": "float"}, "weights.strategy is 'group'. Supported are tensor, channel for"),
        ({"dynamic": True}, "weights.dynamic is True"),
        ({"group_size": 20}, "group_size of .* is 20. Supported are"),
    ],
)
def test_schemes_that_are_not_supported_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_integers(tmp_path)
    change_config(tmp_path, settings(args() | change))
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


def test_a_group_size_that_the_scales_contradict_is_named(tmp_path: Path) -> None:
    write_integers(tmp_path)
    change_config(tmp_path, settings(args(group_size=24)))
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[64, 7\], must have \[64, 5\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config_groups": {"g": {"targets": ["re:("], "weights": args()}}},
            r"target 're:\(' .* not a pattern",
        ),
        ({"config_groups": {"g": ["Linear"]}}, "config_groups.g is .*must be an object with targets"),
        ({"config_groups": []}, "config_groups is .*must be of type dict"),
        ({"config_groups": {"g": {"targets": ["Embedding"], "weights": args()}}}, "no target .* matches"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": args(group_size=None)}}},
            "must be positive",
        ),
    ],
)
def test_damaged_groups_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_integers(tmp_path)
    change_config(tmp_path, settings(args(), **change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("own_name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path, own_name: str) -> None:
    write_integers(tmp_path, symmetric=False)
    change_tensors(tmp_path, lambda state: state.pop(f"{LAYER}.{own_name}"))
    missing = rf"{LAYER}\.weight" if own_name == "weight_packed" else rf"{LAYER}\.{own_name}"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {missing} is missing"):
        load(tmp_path)


def test_codes_without_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    write_integers(tmp_path, 8, packed=False)
    change_tensors(tmp_path, lambda state: state.pop(f"{LAYER}.weight_scale"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight_scale is missing, {LAYER}\.weight is there"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("own_name", "change", "message"),
    [
        ("weight_packed", lambda t: t[:, :-1], r"weight_packed has shape \[112, 7\], must have \[112, 8\]"),
        ("weight_shape", lambda t: t + 1, r"weight_shape is \[113, 65\], the model's layer is \[112, 64\]"),
        ("weight_scale", lambda t: t[:, 1:], r"weight_scale has shape \[112, 3\], must have \[112, 4\]"),
        ("weight_scale", lambda t: t * torch.nan, "scales of .* hold NaN"),
        ("weight_zero_point", lambda t: t[1:], "weight_zero_point is I32|weight_zero_point has shape"),
        ("weight_zero_point", lambda t: torch.full((112, 4), 9, dtype=torch.int8), "values beyond 4 bits"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    tmp_path: Path, own_name: str, change: Any, message: str
) -> None:
    write_integers(tmp_path, symmetric=False)
    key = f"{LAYER}.{own_name}"
    change_tensors(tmp_path, lambda state: state.update({key: change(state[key])}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*({message})"):
        load(tmp_path)


def test_plain_codes_beyond_their_width_are_named(tmp_path: Path) -> None:
    write_integers(tmp_path, 4, packed=False)
    change_tensors(tmp_path, lambda state: state[f"{LAYER}.weight"].fill_(100))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight holds values beyond 4 bits"):
        load(tmp_path)


def test_scales_of_the_cache_are_left_out_with_a_note(tmp_path: Path) -> None:
    expected = write_integers(tmp_path)
    attention = "model.layers.0.self_attn"
    change_tensors(tmp_path, lambda state: state.update({f"{attention}.k_scale": torch.ones(1)}))
    change_config(tmp_path, settings(args(), kv_cache_scheme={"num_bits": 8, "type": "float"}))
    check(load(tmp_path), expected, exact=True)
