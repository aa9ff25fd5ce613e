"""Quantized models saved by either `save_pretrained`: what is written loads, what can't be is said."""

from __future__ import annotations

import copy
import json
import pickle  # noqa: TID251  # people do, and are told
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_efficient_gpt.errors import ConfigError, MegptError
from memory_efficient_gpt.quantization import QuantizedModel, register_format

IDS = torch.arange(4, 20)[None]
QUIET: dict[str, Any] = dict(num_kv_blocks=64, progress=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits.float()
    return result


def native_layers(module: Any) -> int:
    return sum(getattr(part, "packed_weight", None) is not None for part in module.modules())


def loaded_by_transformers(folder: Path, **options: Any) -> Any:
    register_format()
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model, report = from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_the_modules_own_save_pretrained_writes_a_folder_that_loads(tmp_path: Path, scheme: str) -> None:
    model = QuantizedModel.from_pretrained("demo-draft", scheme=scheme, **QUIET)
    model.model.save_pretrained(tmp_path / "by_module")
    model.save_pretrained(tmp_path / "by_us")
    described, ours = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("by_module", "by_us")
    )
    assert described == ours
    again = QuantizedModel.from_pretrained(tmp_path / "by_module", **QUIET)
    assert torch.equal(logits(again), logits(model))
    plain = loaded_by_transformers(tmp_path / "by_module", dtype=torch.bfloat16)
    want = loaded_by_transformers(tmp_path / "by_us", dtype=torch.bfloat16)
    assert torch.equal(logits(plain), logits(want))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("by_module", "by_us")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01), "shared weights are stored once"


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=4, **QUIET)
    name, before = type(model.model).__name__, logits(model)
    model.model.save_pretrained(tmp_path / "saved")
    assert not hasattr(model.model.config, "quantization_config")
    assert type(model.model).__name__ == name == "LlamaForCausalLM"
    assert torch.equal(logits(model), before)


def test_a_folder_that_was_loaded_is_saved_again_by_the_module(tmp_path: Path) -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=8, **QUIET)
    model.save_pretrained(tmp_path / "first")
    QuantizedModel.from_pretrained(tmp_path / "first", **QUIET).model.save_pretrained(tmp_path / "second")
    loaded_by_transformers(tmp_path / "second").save_pretrained(tmp_path / "third")
    for name in ("second", "third"):
        assert torch.equal(logits(QuantizedModel.from_pretrained(tmp_path / name, **QUIET)), logits(model)), (
            name
        )


def test_bitsandbytes_weights_are_refused_by_both_ways_of_saving_with_one_that_works(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = QuantizedModel.from_pretrained("demo", scheme="bnb-nf4", **QUIET)
    for save in (model.save_pretrained, model.model.save_pretrained):
        with pytest.raises(ConfigError, match=r"as int4 or int8 and save that; .* with a BitsAndBytesConfig"):
            save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [4, 16])
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path, bits: int) -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=bits, **QUIET)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"file is a file\. Give a new folder"):
        model.save_pretrained(file)
    with pytest.raises(MegptError, match=r"x cannot be written: .*. Nothing was left there"):
        model.save_pretrained(file / "x")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_folder_without_its_tokenizer_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model around a transformers module: its tokenizer is written last."""
    source = QuantizedModel.from_pretrained("demo-draft", bits=16, **QUIET)
    model = QuantizedModel.from_model(source.model, source.tokenizer, bits=4, num_kv_blocks=64)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", fail)
    with pytest.raises(MegptError, match="No space left on device"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_that_is_loaded_changes_neither_results_nor_how_they_are_computed() -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=4, **QUIET)
    before, native = logits(model), native_layers(model.model)
    model.model.load_state_dict(model.model.state_dict())
    assert torch.equal(logits(model), before)
    assert native_layers(model.model) == native


def test_copies_of_the_module_compute_the_same_and_its_owner_is_not_copied() -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=4, **QUIET)
    twin = copy.deepcopy(model.model)
    assert type(twin) is type(model.model) and torch.equal(logits(twin), logits(model))
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"can't be copied or pickled.*QuantizedModel\.from_model"):
            way(model)


def test_a_module_is_pickled_where_no_compiled_code_is_in_it() -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=4, native_kernels=False, **QUIET)
    twin = pickle.loads(pickle.dumps(model.model))  # noqa: S301  # our own
    assert type(twin) is type(model.model) and torch.equal(logits(twin), logits(model))
    native = QuantizedModel.from_pretrained("demo-draft", bits=4, **QUIET)
    if native_layers(native.model):
        with pytest.raises(TypeError, match=r"can't be pickled; write it with save_pretrained"):
            pickle.dumps(native.model)
