"""AWQ layers against the format's definition, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
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
    "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
    "modules_to_not_convert": None,
}  # fmt: skip
LAYER = "model.layers.1.self_attn.k_proj"


def write_awq(folder: Path, *, group: int | None = 16) -> Tensors:
    def quantize(weight: torch.Tensor) -> packers.Grouped:
        return packers.quantize(weight, group=group, symmetric=False)

    return write(folder, "llama", SETTINGS | {"group_size": group or -1}, quantize, packers.awq)


@pytest.mark.parametrize("group", [16, None])
def test_weights_are_the_definition(tmp_path: Path, group: int | None) -> None:
    expected = write_awq(tmp_path, group=group)
    model = load(tmp_path)
    for name, want in expected.items():
        module = model.get_submodule(name)
        offsets = module.quantized_weight.offsets
        assert close_to(module.dequantize(torch.float64), want, float(offsets.abs().max())), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv'. Supported is gemm"),
        ({"version": "marlin", "zero_point": False}, "version is 'marlin'"),
        ({"version": None, "format": "gemv_fast"}, "version is 'gemv_fast'"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq'. Supported is autoawq"),
        ({"bits": 8}, "bits is 8. Supported is 4"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_awq(tmp_path)
    change_config(tmp_path, SETTINGS | change)
    with pytest.raises(UnsupportedModelError, match=f"AWQ checkpoint: {message}"):
        load(tmp_path)


@pytest.mark.parametrize("own_name", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path, own_name: str) -> None:
    write_awq(tmp_path)
    change_tensors(tmp_path, lambda state: state.pop(f"{LAYER}.{own_name}"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {LAYER}\.{own_name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("own_name", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], r"qweight has shape \[63, 4\], must have \[64, 4\]"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros has shape \[4, 3\], must have \[4, 4\]"),
        ("scales", lambda t: t[:-1], r"scales has shape \[3, 32\], must have \[groups, 32\]"),
        ("scales", lambda t: t.long(), "scales is I64, must be F16 or BF16 or F32"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    tmp_path: Path, own_name: str, change: Any, message: str
) -> None:
    write_awq(tmp_path)
    key = f"{LAYER}.{own_name}"
    change_tensors(tmp_path, lambda state: state.update({key: change(state[key])}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        load(tmp_path)


def test_scales_of_activations_are_not_ignored(tmp_path: Path) -> None:
    """AutoAWQ may scale what an activation function gives; without it all later numbers are wrong."""
    write_awq(tmp_path)
    change_tensors(
        tmp_path, lambda state: state.update({"model.layers.0.mlp.act_fn.scales": torch.ones(112)})
    )
    with pytest.raises(CheckpointError, match=r"mlp\.act_fn\.qweight is missing, .*act_fn\.scales is there"):
        load(tmp_path)
