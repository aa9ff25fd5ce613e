"""A model that lends itself to packed steps is an ordinary one afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_efficient_gpt.attention.interface import ATTENTION_NAME
from memory_efficient_gpt.attention.model_setup import prepare_model, setup_kept
from tests.engine.architectures.configs import CASES


def attributes(model: torch.nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def prepare_and_call(model: PreTrainedModel) -> None:
    """Fails: it has no cache."""
    prepare_model(model)
    model(input_ids=torch.arange(4)[None])


@pytest.mark.parametrize("name", ["gpt2", "llama_dynamic_rope", "phi3_longrope", "mixtral", "gemma3_text"])
def test_what_preparing_changes_is_undone(name: str) -> None:
    model: Any = CASES[name].model(attention="eager")
    model.train(True)
    model.config.output_router_logits = True
    before = attributes(model)
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    with setup_kept(model):
        prepare_model(model)
        assert model.config._attn_implementation == ATTENTION_NAME and not model.training
        assert not model.config.output_router_logits
    assert model.config._attn_implementation == "eager" and model.config.output_router_logits
    assert all(module.training for module in model.modules())
    assert attributes(model) == before
    assert [getattr(module, "rope_type", None) for module in model.modules()] == kinds


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model = CASES["llama"].model(attention="sdpa")
    with pytest.raises(RuntimeError, match="never attached"), setup_kept(model):
        prepare_and_call(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic_rope"])
def test_long_texts_get_their_own_frequencies_again(name: str) -> None:
    model = CASES[name].model()
    ids, beyond = torch.randint(4, 128, (1, 12)), torch.arange(12)[None] + 500
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=beyond, use_cache=False).logits
        short = model(input_ids=ids, use_cache=False).logits
        model(input_ids=ids, position_ids=beyond, use_cache=False)
        with setup_kept(model):
            prepare_model(model)
            model.set_attn_implementation("eager")  # its own attention with the engine's frequencies
            prepared = model(input_ids=ids, use_cache=False).logits
        again = model(input_ids=ids, position_ids=beyond, use_cache=False).logits
    torch.testing.assert_close(prepared, short, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, short, atol=1e-3)  # else this test would show nothing
