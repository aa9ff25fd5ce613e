"""The attention function that transformers calls, and the packed forward pass."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from memory_efficient_gpt import attention
from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext, step_context
from memory_efficient_gpt.attention.interface import (
    ATTENTION_NAME,
    forward_packed,
    paged_attention,
    register,
    resolve_options,
)
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.kv_cache.pool import KVPool
from tests.engine.architectures.configs import CASES
from tests.engine.attention.oracle import expected, make_step


def one_row(num_tokens: int, block_size: int = 4) -> StepContext:
    """A step of one sequence's first tokens, in blocks 1, 2, ..."""
    num_blocks = -(-num_tokens // block_size)
    return StepContext(
        backend=TorchBackend(),
        slots=torch.arange(num_tokens) + block_size,
        block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        max_query_len=num_tokens,
        max_context_len=num_tokens,
    )


def test_registering_twice_is_fine_and_adds_no_mask_function() -> None:
    assert register() == register() == ATTENTION_NAME
    assert AttentionInterface._global_mapping[ATTENTION_NAME] is paged_attention
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS  # or transformers would build masks


def test_call_goes_through_the_modules_cache() -> None:
    backend = TorchBackend()
    step = make_step(backend, [3, 1], [7, 5])
    module = torch.nn.Module()
    module.paged_kv = step.cache  # type: ignore[assignment]  # a plain attribute
    with step_context(step.context):
        output, weights = paged_attention(
            module,
            step.query.transpose(0, 1)[None],
            step.key.transpose(0, 1)[None],
            step.value.transpose(0, 1)[None],
            scaling=0.2,
            sliding_window=3,
            dropout=0.0,
        )
    assert weights is None
    wanted = expected(step, AttentionOptions(scale=0.2, window=3))
    torch.testing.assert_close(output[0].double(), wanted, rtol=2e-6, atol=2e-6)


def test_options_come_from_the_call() -> None:
    module, sinks = torch.nn.Module(), torch.ones(4)
    assert resolve_options(module, 16, {}) == AttentionOptions(scale=0.25)
    assert resolve_options(module, 16, {"scaling": 1.0, "softcap": 0.0}).scale == 1.0
    options = resolve_options(module, 16, {"softcap": 30.0, "s_aux": sinks, "sliding_window": 9})
    assert (options.softcap, options.window) == (30.0, 9)
    assert options.sinks is sinks


@pytest.mark.parametrize(
    "kwargs", [{"is_causal": False}, {"position_bias": 1}, {"indices": 1}, {"block_indices": 1}], ids=str
)
def test_what_cannot_be_computed_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not a causal model|cannot honour"):
        resolve_options(torch.nn.Module(), 16, kwargs)


def test_misuse_is_named() -> None:
    module = torch.nn.Module()
    heads = torch.zeros(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="its cache was never attached"):
        paged_attention(module, heads, heads, heads)
    with pytest.raises(RuntimeError, match="a batch of 2"):
        paged_attention(module, *[heads.repeat(2, 1, 1, 1)] * 3)
    module.paged_kv = LayerCache(  # type: ignore[assignment]  # a plain attribute
        probe_geometry(CASES["llama"].config())[0], heads, heads
    )
    with pytest.raises(RuntimeError, match="outside a step"):
        paged_attention(module, heads, heads, heads)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_logits_of_chosen_rows_only(name: str) -> None:
    model = CASES[name].model()
    ids = torch.arange(5, 16)
    with torch.no_grad():
        wanted = model(input_ids=ids[None], use_cache=False).logits[0]
    prepare_model(model)
    KVPool(probe_geometry(model.config), 6, 4, torch.float32, torch.device("cpu")).attach(model)
    head_rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: head_rows.append(inputs[0].shape[1])
    )
    for rows in ([10, 0, 3], []):
        with torch.no_grad():
            logits = forward_packed(model, ids, torch.arange(11), one_row(11), torch.tensor(rows).long())
        assert logits.shape == (len(rows), 128)
        torch.testing.assert_close(logits, wanted[rows], rtol=1e-5, atol=1e-5)
    assert head_rows == [3, 0]


def test_rows_are_chosen_afterwards_where_the_model_cannot() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.stack((input_ids, position_ids), dim=-1).float()
            return type("Output", (), {"logits": logits})

    logits = forward_packed(Plain(), torch.arange(4, 8), torch.arange(4), one_row(4), torch.tensor([2, 0]))
    assert logits.tolist() == [[6, 2], [4, 0]]


def test_preparing_a_model_turns_off_router_losses() -> None:
    model = CASES["mixtral"].model()
    model.config.output_router_logits = True
    model.train()
    prepare_model(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    assert not model.config.output_router_logits
    assert not model.training


def test_model_that_keeps_its_own_attention_is_refused() -> None:
    class Stubborn(torch.nn.Module):
        config = CASES["llama"].config()

        def set_attn_implementation(self, name: str) -> None:
            self.config._attn_implementation = "eager"

    with pytest.raises(UnsupportedModelError, match="kept its own attention"):
        prepare_model(Stubborn())  # type: ignore[arg-type]  # a stand-in


def test_package_names_are_found_lazily() -> None:
    assert attention.TorchBackend is TorchBackend
    assert "forward_packed" in dir(attention)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        attention.nonsense  # noqa: B018  # the access is the test
    script = "import sys, memory_efficient_gpt.attention, memory_efficient_gpt.kv_cache.geometry as g;"
    script += "g.token_bytes([], 2); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)})
