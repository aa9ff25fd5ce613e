"""Products of layers' inputs over a text: the definition, shared ones, some layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from memory_efficient_gpt.quantization import calibration, input_products
from memory_efficient_gpt.quantization.input_products import InputProducts
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.modules import QuantizedLinear
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
    return {name: shrunk(torch.cat(parts)) for name, parts in seen.items()}


def shrunk(x: torch.Tensor) -> torch.Tensor:
    """By the definition: what is off the diagonal, less the share that chance explains."""
    each = torch.einsum("ti,tj->tij", x, x)
    mean = each.mean(0)
    off = ~torch.eye(len(mean), dtype=torch.bool)
    chance = (each - mean).square().mean(0)[off].sum() / len(x)
    kept = 1 - min(1.0, float(4 * chance / mean[off].square().sum()))
    return torch.where(off, mean * kept, mean)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("most_bytes", [None, 1], ids=["together", "one by one"])
def test_they_are_the_mean_of_products_as_far_as_tokens_tell(
    name: str, most_bytes: int | None, text: torch.Tensor
) -> None:
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


def test_few_tokens_tell_little_and_many_nearly_all() -> None:
    source = torch.Generator().manual_seed(0)
    mixed = torch.randn(32, 32, generator=source) + torch.eye(32)
    kept = []
    for tokens in (2, 1000, 100_000):
        x = torch.randn(tokens, 32, generator=source) @ mixed
        total = input_products._Sum(x)
        total.add(x)
        mean, found = x.t() @ x / tokens, total.shrunk()
        off = ~torch.eye(32, dtype=torch.bool)
        torch.testing.assert_close(found.diagonal(), mean.diagonal())
        kept.append(float((found[off] / mean[off]).mean()))
    assert kept[0] == 0.0 and 0.3 < kept[1] < 0.95 and kept[2] > 0.99


def test_a_layer_that_no_token_reaches_has_none_and_named_inputs_count() -> None:
    class Model(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            x = torch.ones(*input_ids.shape, 16) * input_ids[..., None]
            self.b(x[:, :0])
            return SimpleNamespace(logits=self.a(input=x))

    model: Any = Model()
    layers = [Layer(name, "linear", (16, 16), [(getattr(model, name), QuantizedLinear)]) for name in "ab"]
    products = InputProducts(model, layers, torch.arange(20).view(2, 10))
    first, second = (products.of(layer) for layer in layers)
    assert first is not None and first.diagonal().tolist() == pytest.approx([123.5] * 16)
    assert second is None
