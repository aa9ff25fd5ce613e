"""One product for layers of the same input: right for every input, and nothing is kept or copied."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from memory_efficient_gpt.fusion.merged_linear import DenseProduct, MergedLinear, MergedProduct, part_ways


def layers(bias: bool = True) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Three layers merged into one product, and three like them that are not."""
    torch.manual_seed(0)
    own = nn.ModuleList([nn.Linear(16, n, bias=bias) for n in (8, 4, 12)])
    merged = copy.deepcopy(own)
    DenseProduct([layer for layer in merged if isinstance(layer, nn.Linear)])
    return merged, own


def product_of(merged: nn.ModuleList) -> MergedProduct:
    first = merged[0]
    assert isinstance(first, MergedLinear)
    return first.merged_product


def kept(merged: nn.ModuleList) -> object:
    return product_of(merged)._kept


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of every product that is computed from now on."""
    outputs: list[int] = []
    linear = nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outputs.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return outputs


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_share_one_product(monkeypatch: pytest.MonkeyPatch, bias: bool, inference: bool) -> None:
    merged, own = layers(bias)
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.randn(2, 5, 16)
        want = [layer(x) for layer in own]
        outputs = count_products(monkeypatch)
        got = [layer(x) for layer in merged]
    assert outputs == [24]
    for result, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(result, wanted)
    assert kept(merged) is None


def test_another_input_is_never_given_a_kept_part() -> None:
    merged, own = layers()
    with torch.inference_mode():
        x, other = torch.randn(3, 16), torch.randn(3, 16)
        merged[0](x)
        torch.testing.assert_close(merged[1](other), own[1](other))
        assert kept(merged) is None
        torch.testing.assert_close(merged[1](x), own[1](x))


def test_an_equal_input_that_is_another_tensor_counts_as_another() -> None:
    merged, own = layers()
    with torch.no_grad():
        x = torch.randn(3, 16)
        merged[0](x)
        again = x.view(3, 16)
        again.zero_()
        torch.testing.assert_close(merged[1](again), own[1](again))


def test_an_input_changed_in_place_is_computed_again() -> None:
    merged, own = layers()
    with torch.no_grad():
        x = torch.randn(3, 16)
        merged[0](x)
        x.mul_(2)
        torch.testing.assert_close(merged[1](x), own[1](x))


def test_a_layer_called_twice_with_one_input_computes_again() -> None:
    merged, own = layers()
    with torch.no_grad():
        x = torch.randn(3, 16)
        for layer in (0, 1, 1, 2, 0, 2):
            torch.testing.assert_close(merged[layer](x), own[layer](x))


def test_no_tensor_is_kept_alive_once_all_took_their_parts() -> None:
    merged, _ = layers()
    with torch.no_grad():
        x = torch.randn(3, 16)
        first, second, third = (layer(x) for layer in merged)
    seen = weakref.ref(x)
    out = weakref.ref(first._base)
    del x, first, second, third
    gc.collect()
    assert seen() is None and out() is None


def test_parameters_stay_and_share_the_bytes_they_had() -> None:
    torch.manual_seed(0)
    own = [nn.Linear(16, n) for n in (8, 4)]
    before = [(id(p), p.detach().clone()) for layer in own for p in layer.parameters()]
    DenseProduct(own)
    after = [p for layer in own for p in layer.parameters()]
    assert [id(p) for p in after] == [number for number, _ in before]
    for parameter, (_, value) in zip(after, before, strict=True):
        assert torch.equal(parameter, value) and parameter.is_contiguous() and parameter.requires_grad
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in after}
    assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in after)


def test_a_state_dict_is_saved_and_loaded_as_before(tmp_path: Path) -> None:
    merged, own = layers()
    safetensors.torch.save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    assert list(merged.state_dict()) == list(own.state_dict())
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.state_dict().items())
    doubled = {name: tensor * 2 for name, tensor in own.state_dict().items()}
    merged.load_state_dict(doubled)
    own.load_state_dict(doubled)
    with torch.no_grad():
        x = torch.randn(3, 16)
        for layer, wanted in zip(merged, own, strict=True):
            torch.testing.assert_close(layer(x), wanted(x))


def test_gradients_are_the_layers_own() -> None:
    merged, own = layers()
    x = torch.randn(3, 16)
    for each in (merged, own):
        sum(layer(x).square().sum() for layer in each).backward()
    for got, want in zip(merged.parameters(), own.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("change", ["dtype", "one weight", "copy", "one bias"])
def test_parameters_that_were_replaced_are_noticed(change: str) -> None:
    merged, own = layers()
    if change == "dtype":
        merged.double()
        own.double()
    elif change == "copy":
        merged = copy.deepcopy(merged)
    else:
        name = "weight" if change == "one weight" else "bias"
        for each in (merged, own):
            parameter = each[1].get_parameter(name)
            parameter.data = torch.ones_like(parameter)
    with torch.no_grad():
        x = torch.randn(3, 16, dtype=own[0].get_parameter("weight").dtype)
        for layer, wanted in zip(merged, own, strict=True):
            torch.testing.assert_close(layer(x), wanted(x))


def test_moved_weights_leave_no_bytes_behind() -> None:
    merged, _ = layers()
    storage = weakref.ref(merged[0].get_parameter("weight").untyped_storage())
    data = merged[0].get_parameter("weight").data_ptr()
    merged.double()
    gc.collect()
    assert storage() is None
    assert data not in {t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor}


def test_layers_that_part_are_as_they_were() -> None:
    merged, own = layers()
    for layer in merged:
        assert isinstance(layer, MergedLinear)
        part_ways(layer)
    assert [type(layer) for layer in merged] == [nn.Linear] * 3
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(merged, own, strict=True))
    storages = {p.untyped_storage().data_ptr() for p in merged.parameters()}
    assert len(storages) == 6
