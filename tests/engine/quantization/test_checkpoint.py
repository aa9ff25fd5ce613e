"""Quantized folders: saved equals unsaved bit for bit, plain transformers loads them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.memory import estimate
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization.checkpoint import register_format, save_quantized
from memory_efficient_gpt.quantization.model import give_kernels, quantized_modules
from tests.engine.quantization.test_model import CONFIGS, logits, quantized


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    register_format()
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model, report = from_pretrained(folder, dtype=dtype, output_loading_info=True)
    return model.train(False), report


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*product(CONFIGS, ["int4", "fp8"]),
     *product(["llama-tied", "gpt2"], ["int8", "int4-asym-g64", "int8-tensor", "int4-channel"])],
)  # fmt: skip
def test_saved_is_unsaved_bit_for_bit(tmp_path: Path, name: str, scheme: str) -> None:
    model = quantized(name, scheme)
    save_quantized(model, tmp_path / "saved")
    again, report = load(tmp_path / "saved")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype is tensor.dtype and torch.equal(got[key], tensor), key
    assert torch.equal(logits(again), logits(model))


def test_a_model_on_native_kernels_is_saved_as_one_without(tmp_path: Path) -> None:
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        pytest.skip(kernels.reason)
    model = quantized("llama-tied")
    save_quantized(model, tmp_path / "plain")
    give_kernels(model, kernels)
    save_quantized(model, tmp_path / "native")
    plain, native = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "native"))
    assert plain == native


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    (file,) = save_quantized(quantized("llama-tied"), tmp_path / "saved")
    described = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert described["shared"] == {"lm_head": "model.embed_tokens"}
    assert b"lm_head" not in file.read_bytes()[:20_000]
    again, _ = load(tmp_path / "saved")
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.quantized_weight.codes.data_ptr() == embedding.quantized_weight.codes.data_ptr()


def test_the_compute_dtype_is_free_and_the_scales_stay(tmp_path: Path) -> None:
    model = quantized("llama")
    save_quantized(model, tmp_path / "saved")
    again, _ = load(tmp_path / "saved", torch.bfloat16)
    assert again(torch.arange(5)[None]).logits.dtype is torch.bfloat16
    for mine, theirs in zip(quantized_modules(model), quantized_modules(again), strict=True):
        assert torch.equal(mine.quantized_weight.scales, theirs.quantized_weight.scales)


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        save_quantized(quantized("llama"), tmp_path)


def test_tokenizer_files_are_copied_and_weights_of_the_source_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"):
        (source / name).write_text("{}")
    save_quantized(quantized("llama"), tmp_path / "saved", source=source)
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()
    assert "quantization_config" in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99 of the quantized format"),
        ({"version": "1"}, r"config.json: quantization_config.version is '1', not a whole number"),
        ({"modules": {"model.layers.7.mlp.up_proj": "int4"}}, "does not have: model.layers.7.mlp.up_proj"),
        ({"modules": None}, r"quantization_config.modules must map names of modules to schemes, got None"),
        ({"modules": {"lm_head": 4}}, r"modules\['lm_head'\] must be a scheme's name, got 4"),
        ({"modules": {"lm_head": "int5"}}, r"modules\['lm_head'\]: quantization scheme 'int5' is unknown"),
        (
            {"modules": {"lm_head": "bnb-nf4"}},
            r"modules\['lm_head'\]: bnb-nf4 is no scheme of this",
        ),
        ({"shared": {"lm_head": "nope"}}, r"shared must say .* got \{'lm_head': 'nope'\}"),
        ({"shared": ["lm_head"]}, r"shared must say .* got \['lm_head'\]"),
        ({"reordered": "lm_head"}, r"reordered must list quantized modules, got 'lm_head'"),
    ],
)
def test_what_does_not_fit_the_architecture_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_quantized(quantized("llama"), tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(tmp_path / "saved")
    assert str(refusal.value).startswith(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError) as planned:
        estimate(EngineConfig(model=str(tmp_path / "saved")))
    assert str(tmp_path / "saved") in str(planned.value)
