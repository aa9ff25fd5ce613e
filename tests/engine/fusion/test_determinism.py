"""What in a model lets a token's numbers depend on what is computed beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_efficient_gpt.attention.context import AttentionBackend
from memory_efficient_gpt.attention.cpu import NativeCPUBackend
from memory_efficient_gpt.attention.interface import CACHE_ATTRIBUTE
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.fusion.determinism import product_obstacles
from memory_efficient_gpt.fusion.determinism_trial import try_determinism
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from tests.engine.architectures.configs import CASES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


@pytest.fixture(scope="module")
def backend(kernels: Kernels) -> AttentionBackend:
    found = NativeCPUBackend.create(torch.bfloat16, torch.bfloat16)
    assert not isinstance(found, Unavailable)
    return found


def prepared(name: str) -> PreTrainedModel:
    model = CASES[name].model()
    torch.nn.Module.to(model, torch.bfloat16)
    prepare_model(model)
    return model


def tried(model: PreTrainedModel, backend: AttentionBackend) -> str | None:
    return try_determinism(model, probe_geometry(model.config), backend, CPU, torch.bfloat16, 8)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_models_on_native_kernels_compute_each_token_alike(
    name: str, kernels: Kernels, backend: AttentionBackend
) -> None:
    model = prepared(name)
    fuse(model, kernels)
    assert product_obstacles(model, kernels) == []
    assert tried(model, backend) is None
    assert not any(CACHE_ATTRIBUTE in vars(module) for module in model.modules())


def test_layers_of_other_libraries_are_counted(kernels: Kernels) -> None:
    model = prepared("llama")
    (reason,) = product_obstacles(model, kernels)
    assert "linear layers are multiplied by other libraries in bfloat16" in reason
    assert int(reason.split()[0]) == sum(isinstance(m, torch.nn.Linear) for m in model.modules())


def test_routed_experts_are_named(kernels: Kernels) -> None:
    model = prepared("mixtral")
    fuse(model, kernels)
    reasons = product_obstacles(model, kernels)
    assert any("routed experts" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("least", "said"), [(7, "in chunks"), (20, "among other sequences")], ids=["chunks", "neighbours"]
)
def test_code_that_looks_at_the_number_of_tokens_is_found(
    least: int, said: str, kernels: Kernels, backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = prepared("llama")
    fuse(model, kernels)
    layer = model.model.layers[0]
    own = layer.mlp.forward
    monkeypatch.setattr(
        layer.mlp, "forward", lambda x: own(x) * (1.0 if x.shape[1] < least else 1.01), raising=False
    )
    assert tried(model, backend) == f"computed {said}"
