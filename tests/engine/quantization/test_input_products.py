"""Products of layers' inputs over a text: the definition, shared ones, some layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memory_efficient_gpt.quantization import calibration
from memory_efficient_gpt.quantization.input_products import InputProducts
from memory_efficient_gpt.quantization.layers import find_layers
from tests.engine.architectures.configs import CASES


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 60, (5, 24), generator=torch.Generator().manual_seed(0))


def expected(model: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """By layer, from all its inputs at once, in float64."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            seen.setdefault(name, []).append(inputs[0].detach().double().flatten(0, -2))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(layer.name))
        for layer in find_layers(model)
        if layer.role in ("linear", "head")
        for module, _ in layer.holders
        if not isinstance(module, nn.Embedding)
    ]
    with torch.no_grad():
        model(input_ids=text)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: x.t() @ x / len(x) for name, x in rows.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("most_bytes", [None, 1], ids=["together", "one by one"])
def test_they_are_the_mean_of_products(name: str, most_bytes: int | None, text: torch.Tensor) -> None:
    model: Any = CASES[name].model()
    layers = find_layers(model)
    products = InputProducts(model, layers, text, most_bytes)
    wanted = expected(model, text)
    for layer in layers:
        got = products.of(layer)
        assert (got is None) == (layer.name not in wanted), layer.name
        if got is not None:
            torch.testing.assert_close(got.double(), wanted[layer.name], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_queries_keys_and_values_share_theirs(text: torch.Tensor) -> None:
    model: Any = CASES["llama"].model()
    layers = [layer for layer in find_layers(model) if ".0.self_attn." in layer.name]
    products = InputProducts(model, layers, text)
    query, key, value, output = (products.of(layer) for layer in layers)
    assert query is key is value and output is not query


def test_the_model_runs_as_often_as_there_is_no_room(
    text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = CASES["llama"].model()
    layers = [layer for layer in find_layers(model) if layer.role == "linear"]
    runs = 0
    usual = calibration.logits_of

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return usual(*arguments)

    monkeypatch.setattr("memory_efficient_gpt.quantization.input_products.logits_of", counted)
    sizes = [4 * layer.shape[1] ** 2 for layer in layers]
    told: list[float] = []
    products = InputProducts(model, layers, text, sum(sizes[:7]), lambda _, share: told.append(share))
    for layer in layers:
        products.of(layer)
    assert len(layers) == 14 and runs == len(told) == 2, "one block of the model at a time"
