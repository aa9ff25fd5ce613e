"""Calibration: moments are those of the inputs, texts are the model's own, the model stays as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization import calibration
from memory_efficient_gpt.quantization.calibration import (
    LEAST_TOKENS,
    SEQUENCE_LENGTH,
    first_token,
    logits_of,
    second_moments,
    self_generated,
    split_text,
)
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import INT4
from tests.engine.quantization.test_model import TINY, tiny

IDS = torch.arange(48).view(4, 12) % 99


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().flatten(0, -2).mean(0)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(torch.allclose(got.double(), want, rtol=1e-5, atol=1e-9))


def test_moments_are_the_mean_squares_of_what_goes_into_each_layer() -> None:
    model = tiny("llama-tied")
    moments = second_moments(model, IDS)
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        layer = model.model.layers[0]
        first = layer.input_layernorm(model.model.embed_tokens(IDS))
    for name in "qkv":
        assert close(moments[f"model.layers.0.self_attn.{name}_proj"], mean_square(first))
    assert close(moments["model.embed_tokens"], mean_square(hidden)), "a tied weight multiplies in the head"
    assert moments["model.layers.0.mlp.down_proj"].shape == (112,)


def test_moments_of_a_transposed_layer() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        block = model.transformer
        x = block.h[0].ln_1(block.wte(IDS) + block.wpe(torch.arange(12)))
    assert close(second_moments(model, IDS)["transformer.h.0.attn.c_attn"], mean_square(x))


def test_the_number_of_texts_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    whole = second_moments(model, IDS)
    monkeypatch.setattr(calibration, "TOKENS_AT_ONCE", 12)
    told: list[float] = []
    single = second_moments(model, IDS, progress=lambda what, share: told.append(share))
    assert all(close(single[name], moments.double()) for name, moments in whole.items())
    assert told == [0.0, 0.25, 0.5, 0.75]


def test_embeddings_experts_and_layers_without_tokens_are_absent() -> None:
    assert "model.embed_tokens" not in second_moments(tiny("llama"), IDS)
    assert not any("experts" in name for name in second_moments(tiny("mixtral"), IDS))
    model = tiny("llama")
    model.model.unused = torch.nn.Linear(64, 64)
    assert "model.unused" not in second_moments(model, IDS)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_the_model_stays_as_it_was_and_takes_the_moments(name: str) -> None:
    model = tiny(name)
    before, state = logits_of(model, IDS), {k: v.clone() for k, v in model.state_dict().items()}
    moments = second_moments(model, IDS)
    self_generated(model, 64, 0)
    assert torch.equal(logits_of(model, IDS), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    quantize_model(model, uniform_plan(find_layers(model), INT4), importances=moments)


def test_hooks_go_when_the_model_fails() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError):
        second_moments(model, torch.full((1, 4), 1000))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_seed_repeats_its_text_and_others_differ() -> None:
    model = tiny("llama")
    ids = self_generated(model, 600, seed=3)
    assert ids.shape == (3, SEQUENCE_LENGTH) and ids.dtype is torch.int64
    assert (ids[:, 0] == 1).all(), "the begin-of-sequence token"
    assert torch.equal(self_generated(model, 600, seed=3), ids)
    assert not torch.equal(self_generated(model, 600, seed=4), ids)
    assert self_generated(model, 70, seed=3).shape == (1, 70)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM
    model = make.from_config(LlamaConfig(**TINY, max_position_embeddings=2)).train(False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # far from all alike
    ids = self_generated(model, 20_000, seed=0)
    assert ids.shape == (10_000, 2)
    want = logits_of(model, ids[:1, :1])[0, 0].softmax(-1)
    got = torch.bincount(ids[:, 1], minlength=99) / len(ids)
    # 10,000 draws of 99 kinds: the distance is below 0.04 unless the distribution is another one
    assert float((got - want).abs().sum()) / 2 < 0.06
    assert float((want - 1 / 99).abs().sum()) / 2 > 0.2


def test_a_model_without_a_cache_writes_the_same_text() -> None:
    model = tiny("llama")

    class Cacheless:
        config, device = model.config, model.device

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=model(input_ids=input_ids, use_cache=False).logits)

    cacheless: Any = Cacheless()
    assert torch.equal(self_generated(cacheless, 64, 0), self_generated(model, 64, 0))


def test_a_text_becomes_pieces_that_begin_as_it_does() -> None:
    config = tiny("llama").config
    ids = [1, *(10 + i % 80 for i in range(1000))]
    pieces = split_text(config, ids)
    assert pieces.shape == (3, SEQUENCE_LENGTH)
    assert (pieces[:, 0] == 1).all()
    assert pieces[:, 1:].flatten().tolist() == ids[1 : 1 + 3 * (SEQUENCE_LENGTH - 1)]
    assert split_text(config, ids[1:]).flatten().tolist() == ids[1 : 1 + 3 * SEQUENCE_LENGTH]
    assert split_text(config, ids[: LEAST_TOKENS + 5]).shape == (1, LEAST_TOKENS + 5)


def test_pieces_of_a_long_text_are_spread_over_it() -> None:
    ids = list(range(10 * SEQUENCE_LENGTH))
    pieces = split_text(LlamaConfig(bos_token_id=None), ids, most_tokens=3 * SEQUENCE_LENGTH + 10)
    assert pieces[:, 0].tolist() == [0, 4 * SEQUENCE_LENGTH, 9 * SEQUENCE_LENGTH]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"has 7 tokens; at least {LEAST_TOKENS}"):
        split_text(LlamaConfig(), list(range(7)))
    with pytest.raises(ConfigError, match="has 0 tokens"):
        split_text(LlamaConfig(), [])


@pytest.mark.parametrize(
    ("bos", "eos", "first"), [(5, 6, 5), (None, 6, 6), (None, [7, 8], 7), (None, None, 0)]
)
def test_texts_begin_with_what_the_model_knows(bos: int | None, eos: Any, first: int) -> None:
    assert first_token(LlamaConfig(bos_token_id=bos, eos_token_id=eos)) == first
