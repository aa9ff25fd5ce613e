"""GPTQ layers against the format's definition: widths, groups, zero points, activation order, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
from memory_efficient_gpt.quantization.reordered import ReorderedLinear
from tests.engine.quantization.foreign import packers
from tests.engine.quantization.foreign.folders import (
    Tensors,
    change_config,
    change_tensors,
    close_to,
    load,
    write,
)

SETTINGS: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
    "checkpoint_format": "gptq",
}  # fmt: skip
LAYER = "model.layers.0.mlp.down_proj"


def write_gptq(
    folder: Path,
    *,
    minus_one: bool = True,
    with_index: bool = True,
    shuffled: bool = False,
    **options: Any,
) -> Tensors:
    """group 32 and K 112: the last group of down_proj is short."""

    def quantize(weight: torch.Tensor) -> packers.Grouped:
        index = torch.arange(weight.shape[1]) // (options.get("group") or weight.shape[1])
        if shuffled:
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(5))]
        return packers.quantize(weight, index=index, **options)

    def pack(weight: packers.Grouped) -> Tensors:
        return packers.gptq(weight, minus_one=minus_one, with_index=with_index)

    settings = SETTINGS | {
        "bits": options.get("bits", 4),
        "group_size": options.get("group") or -1,
        "checkpoint_format": "gptq" if minus_one else "gptq_v2",
        "desc_act": shuffled,
    }
    return write(folder, "llama", settings, quantize, pack)


def check(model: Any, expected: Tensors, *, exact: bool) -> None:
    for name, want in expected.items():
        module = model.get_submodule(name)
        weight = module.quantized_weight
        assert (weight.offsets is None) == exact, name
        largest = float(weight.offsets.abs().max() * weight.unit) if weight.offsets is not None else 0.0
        assert close_to(module.dequantize(torch.float64), want, largest), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "minus_one"), [(16, False), (32, True), (None, True)])
def test_weights_are_the_definition(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool, minus_one: bool
) -> None:
    expected = write_gptq(tmp_path, bits=bits, group=group, symmetric=symmetric, minus_one=minus_one)
    check(load(tmp_path), expected, exact=symmetric)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_zero_borrows_from_its_neighbour_in_version_1(tmp_path: Path, bits: int) -> None:
    def quantize(weight: torch.Tensor) -> packers.Grouped:
        grouped = packers.quantize(weight, bits=bits, group=32, symmetric=False)
        grouped.zeros[::3] = 0
        return grouped

    expected = write(tmp_path, "llama", SETTINGS | {"bits": bits}, quantize, packers.gptq)
    check(load(tmp_path), expected, exact=False)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_activation_order_is_exact(tmp_path: Path, bits: int) -> None:
    model = load_after(tmp_path, write_gptq(tmp_path, bits=bits, group=16, shuffled=True))
    module = model.get_submodule(LAYER)
    assert isinstance(module, ReorderedLinear)
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(x), x @ module.weight.t(), atol=1e-5)


def load_after(folder: Path, expected: Tensors) -> Any:
    model = load(folder)
    check(model, expected, exact=True)
    return model


def test_groups_without_g_idx_are_contiguous(tmp_path: Path) -> None:
    expected = write_gptq(tmp_path, group=32, with_index=False)
    check(load(tmp_path), expected, exact=True)


def test_layers_may_differ_in_bits_and_groups(tmp_path: Path) -> None:
    widths = iter([8, 4, 3, 2] * 4)

    def quantize(weight: torch.Tensor) -> packers.Grouped:
        bits = next(widths)
        return packers.quantize(weight, bits=bits, group=16 if bits == 8 else 32)

    expected = write(tmp_path, "llama", SETTINGS, quantize, packers.gptq)
    check(load(tmp_path), expected, exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'. Supported are gptq and gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'. Supported is int32"),
        ({"adapter": {"path": "x"}}, "adapter is .*Merge it into the model"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_gptq(tmp_path, group=32)
    change_config(tmp_path, SETTINGS | change)
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("group", [12, 28])
def test_groups_that_kernels_lack_are_refused_with_their_size(tmp_path: Path, group: int) -> None:
    write_gptq(tmp_path, group=group)
    with pytest.raises(
        UnsupportedModelError, match=f"group_size of model.layers.* is {group}. Supported are"
    ):
        load(tmp_path)


@pytest.mark.parametrize("own_name", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path, own_name: str) -> None:
    write_gptq(tmp_path, group=32)
    change_tensors(tmp_path, lambda state: state.pop(f"{LAYER}.{own_name}"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {LAYER}\.{own_name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("own_name", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], r"qweight has shape \[13, 64\], a weight of 64 x 112 has \[7, 64\]"),
        ("qweight", lambda t: t.short(), "qweight is I16, must be I32"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros has shape \[4, 7\], must have \[4, 8\]"),
        ("scales", lambda t: t[:, :-1], r"scales has shape \[4, 63\], must have \[groups, 64\]"),
        ("scales", lambda t: t * torch.inf, "scales of .* hold NaN or infinity"),
        ("g_idx", lambda t: t[:-1], r"g_idx has shape \[111\], must have \[112\]"),
        ("g_idx", lambda t: t + 1, "g_idx names groups 1..4, there are 4"),
        ("g_idx", lambda t: t.clamp(max=2), "g_idx has groups of unequal sizes|has 4 groups"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    tmp_path: Path, own_name: str, change: Any, message: str
) -> None:
    write_gptq(tmp_path, group=32)
    key = f"{LAYER}.{own_name}"
    change_tensors(tmp_path, lambda state: state.update({key: change(state[key])}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        load(tmp_path)


def test_a_group_count_that_the_settings_contradict_is_named(tmp_path: Path) -> None:
    write_gptq(tmp_path, group=32, with_index=False)
    change_config(tmp_path, SETTINGS | {"group_size": 64})
    with pytest.raises(CheckpointError, match="scales has 4 groups, 112 inputs by 64 are 2"):
        load(tmp_path)


def test_a_tensor_that_is_not_of_the_format_is_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path, group=32)
    change_tensors(tmp_path, lambda state: state.update({f"{LAYER}.channel_scale": torch.ones(112)}))
    with pytest.raises(UnsupportedModelError, match=rf"{LAYER}\.channel_scale in .* is not a tensor of"):
        load(tmp_path)
