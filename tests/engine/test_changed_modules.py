"""A transformers module that is changed after the paged cache holds it generates as it is then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_efficient_gpt import lent_module
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.kv_cache import use_paged_kv_cache_if_available
from memory_efficient_gpt.module_state import state_of
from memory_efficient_gpt.quantization import QuantizedModel

IDS = torch.tensor([[300, 8, 900, 41, 77, 5, 1200, 640, 33, 90, 12, 7, 500, 61, 2, 19, 44, 3, 8, 99]])
GREEDY: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)


def paged(bits: int, **options: Any) -> QuantizedModel:
    model = QuantizedModel.from_pretrained("demo", bits=bits, num_kv_blocks=64, progress=False, **options)
    assert use_paged_kv_cache_if_available(model).available
    return model


def to_float32(module: Any) -> None:
    module.to(torch.float32)


def to_float32_and_back(module: Any) -> None:
    module.to(torch.float32)
    module.to(torch.bfloat16)


def to_float16(module: Any) -> None:
    torch.nn.Module.half(module)


def fewer_layers(module: Any) -> None:
    module.model.layers = module.model.layers[:2]
    module.config.num_hidden_layers = 2


def another_norm(module: Any) -> None:
    module.model.norm.weight = torch.nn.Parameter(-module.model.norm.weight.detach(), requires_grad=False)


def norm_in_place(module: Any) -> None:
    with torch.no_grad():
        module.model.norm.weight.neg_()


def first_norm_behind_data(module: Any) -> None:
    norm = module.model.layers[0].input_layernorm.weight
    norm.data = norm.data * 3


CHANGES = (
    to_float32, to_float32_and_back, to_float16, fewer_layers, another_norm, norm_in_place,
    first_norm_behind_data,
)  # fmt: skip


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_is_what_generates(bits: int, change: Callable[[Any], None]) -> None:
    model = paged(bits)
    before = model.generate(IDS, **GREEDY)  # its prompt is in the prefix cache, its steps are recorded
    change(model.model)
    freed = [torch.full((1000,), torch.nan) for _ in range(2000)]  # where old tensors were
    found = model.generate(IDS, **GREEDY)
    del freed
    fresh = QuantizedModel.from_model(model.model, num_kv_blocks=64, prefix_cache=False, record_steps=False)
    assert use_paged_kv_cache_if_available(fresh).available
    assert torch.equal(found, fresh.generate(IDS, **GREEDY))
    assert model.info.tier == "B" and model.info.dtype == str(model.model.dtype).removeprefix("torch.")
    if change not in (to_float32, to_float32_and_back, to_float16):
        assert not torch.equal(found, before)


def test_what_native_kernels_do_not_take_is_left_to_torch_with_a_note() -> None:
    model = paged(4)
    to_float16(model.model)
    assert model.generate("The old house", **GREEDY).startswith("The old house")
    assert any("attention by torch" in note and "float16" in note for note in model.info.notes)


def test_before_the_paged_cache_changes_are_followed_too() -> None:
    model = QuantizedModel.from_pretrained("demo-draft", bits=8, progress=False)
    model.generate(IDS, **GREEDY)
    to_float32(model.model)
    assert model.info.dtype == "float32" and model.info.tier == "C"
    assert torch.equal(model.generate(IDS, **GREEDY)[:, :20], IDS)


def test_an_engine_that_cannot_be_built_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = paged(4)
    want = model.generate(IDS, **GREEDY)
    to_float32_and_back(model.model)

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(["no room"])

    with monkeypatch.context() as patch:
        patch.setattr(lent_module, "build", refuse)
        for _ in range(2):
            with pytest.raises(ConfigError, match="no room"):
                model.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), want)


def test_generating_changes_no_mark_and_needs_no_new_engine() -> None:
    model = paged(4)
    engine, state = model._lent._llm.engine, state_of(model.model)
    model.generate(IDS, **GREEDY)
    module: Any = model.model
    module(IDS)
    module.generate(IDS, **GREEDY)
    assert state_of(model.model) == state
    model.generate(IDS, **GREEDY)
    assert model._lent._llm.engine is engine
