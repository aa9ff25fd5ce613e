"""Finding and checking checkpoints: what is damaged is refused by name, before it is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from memory_efficient_gpt.loading import (
    bundled_models,
    check_checkpoint,
    load_config,
    load_model,
    resolve_model,
)

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def _load(folder: Path) -> torch.nn.Module:
    check_checkpoint(folder)
    return load_model(folder, load_config(folder), dtype=torch.float32, device=torch.device("cpu"))


def test_intact_checkpoint_loads_ready_for_inference(folder: Path) -> None:
    model = _load(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_sharded_checkpoint_loads_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path, max_shard_size="20KB")
    files = check_checkpoint(tmp_path)
    assert len(files) > 1
    _load(tmp_path)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=files[0].name):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_named_with_both_sizes(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(cut off|truncated)"):
        check_checkpoint(folder)


def test_appended_bytes_are_noticed(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all!",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    ],
)
def test_damaged_header_is_refused(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_checkpoint(folder)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Only safetensors are loaded"):
        check_checkpoint(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError):
        _load(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["num_hidden_layers"] = 3
    raw.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        _load(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ud800"])
def test_unreadable_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_checkpoint(folder)


def test_unknown_architecture_is_refused_and_its_code_is_not_run(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UnsupportedModelError, match=r"config\.json.*mystery"):
        load_config(folder)


def test_unknown_model_says_where_it_looked() -> None:
    with pytest.raises(ModelNotFoundError, match="demo"):
        resolve_model("no-such-model")
    with pytest.raises(ModelNotFoundError, match="could not be fetched"):
        resolve_model("no-such/model")


def test_bundled_models_are_whole() -> None:
    found = bundled_models()
    assert set(found) == {"demo", "demo-mha", "demo-draft"}
    for path in found.values():
        check_checkpoint(path)
        assert resolve_model(path.name) == path
