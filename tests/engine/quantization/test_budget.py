"""Budgets: never exceeded, best by brute force, and bits go where they matter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization import budget as budgets
from memory_efficient_gpt.quantization.budget import DEFAULT_OPTIONS, MixedPlan, choose_schemes, least_cost
from memory_efficient_gpt.quantization.groups import bits_range, group_layers
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import bits_per_weight
from memory_efficient_gpt.quantization.scheme import INT8, UNQUANTIZED
from memory_efficient_gpt.quantization.sensitivity import Reference, Sensitivity, measure
from tests.engine.quantization.test_model import tiny

IDS = (torch.arange(96).view(6, 16) * 7) % 99

Instance = tuple[list[list[int]], list[list[float]], int]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Groups with a few candidates each, and a budget around what they take."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    sizes = [draw(st.lists(st.integers(1, 60), min_size=w, max_size=w)) for w in widths]
    cost = st.integers(0, 1000).map(lambda n: n / 8)  # sums are exact
    costs = [draw(st.lists(cost, min_size=w, max_size=w)) for w in widths]
    return sizes, costs, draw(st.integers(0, sum(map(max, sizes)) + 5))


def brute_force(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> float | None:
    possible = [
        sum(cost for _, cost in picks)
        for picks in itertools.product(
            *(list(zip(s, c, strict=True)) for s, c in zip(sizes, costs, strict=True))
        )
        if sum(size for size, _ in picks) <= budget
    ]
    return min(possible, default=None)


def total(values: Sequence[Sequence[float]], picks: Sequence[int]) -> float:
    return sum(group[pick] for group, pick in zip(values, picks, strict=True))


@given(instances())
@settings(max_examples=200, deadline=None)
def test_it_is_the_best_there_is(instance: Instance) -> None:
    sizes, costs, budget = instance
    picks, best = least_cost(sizes, costs, budget), brute_force(sizes, costs, budget)
    assert (picks is None) == (best is None)
    if picks is not None:
        assert total(sizes, picks) <= budget
        assert total(costs, picks) == best


@given(instances(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_larger_units_keep_the_budget_and_gain_from_more_of_it(instance: Instance, most_units: int) -> None:
    sizes, costs, _ = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "MOST_UNITS", most_units)
        last = float("inf")
        for budget in range(sum(map(min, sizes)), sum(map(max, sizes)) + 1):
            picks = least_cost(sizes, costs, budget)
            assert picks is not None and total(sizes, picks) <= budget
            assert total(costs, picks) <= last
            last = total(costs, picks)


def test_models_of_real_size_are_planned_exactly_and_at_once() -> None:
    """32 layers of 4 groups as in an 8B model: more units than `MOST_UNITS`, and never over the budget."""
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] * 32
    sizes = [
        [n * k * 4 + n * (k // 128) * 16, n * k * 4 + n * (k // 32) * 16, n * k * 8 + n * 16]
        for n, k in shapes
    ]
    drawn = torch.rand(len(shapes), generator=torch.Generator().manual_seed(0)).tolist()
    costs = [[x * 0.01, x * 0.0066, x * 0.00005] for x in drawn]
    weights = sum(n * k for n, k in shapes)
    for bits in (4.2, 4.5, 5.0, 6.0):
        budget = int(bits * weights)
        picks = least_cost(sizes, costs, budget)
        assert picks is not None
        assert budget * 0.999 <= total(sizes, picks) <= budget


def measured(model: Any, **options: Any) -> list[Sensitivity]:
    return measure(Reference(model, IDS), group_layers(find_layers(model), **options), DEFAULT_OPTIONS)


def test_a_budget_is_never_exceeded_and_more_bits_never_cost_more() -> None:
    model = tiny("llama-tied")
    found, layers = measured(model), find_layers(model)
    least, most = bits_range(group_layers(layers), DEFAULT_OPTIONS)
    last: MixedPlan | None = None
    for step in range(101):
        bits = least + (most - least) * step / 100
        plan = choose_schemes(found, bits)
        assert plan.bits_per_weight <= bits + 1e-9
        assert plan.bits_per_weight == pytest.approx(bits_per_weight(layers, plan.schemes))
        assert last is None or plan.divergence <= last.divergence
        last = plan
    assert last is not None and set(last.schemes.values()) == {INT8}
    assert last.num_bytes == sum(-(-group.stored_bits(INT8) // 8) for group in group_layers(layers))


def test_a_layer_made_sensitive_gets_more_bits_than_its_likes() -> None:
    model, name = tiny("llama"), "model.layers.1.self_attn.o_proj"
    usual = choose_schemes(measured(model), 5.2)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(30.0)  # what it gives now drowns the rest
    plan = choose_schemes(measured(model), 5.2)
    assert usual.schemes[name] != INT8
    assert plan.schemes[name] == INT8
    assert INT8 not in [scheme for other, scheme in plan.schemes.items() if "layers.0" in other]


def test_a_layer_made_to_do_nothing_gets_few_bits() -> None:
    model = tiny("llama")
    names = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    usual = choose_schemes(measured(model), 7.8)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
    plan = choose_schemes(measured(model), 7.8)
    assert [usual.schemes[name] for name in names] == [INT8] * 3
    assert INT8 not in {plan.schemes[name] for name in names}


def test_pins_are_kept_and_counted() -> None:
    model = tiny("llama")
    layers = find_layers(model)
    pinned = {"lm_head": UNQUANTIZED, "model.layers.0.self_attn.q_proj": INT8}
    plan = choose_schemes(measured(model, pins=pinned), 6.5)
    assert {name: plan.schemes[name] for name in pinned} == pinned
    assert plan.bits_per_weight <= 6.5
    assert bits_per_weight(layers, plan.schemes) == pytest.approx(plan.bits_per_weight)


def test_a_plan_is_what_quantizing_takes() -> None:
    model = tiny("llama-tied")
    plan = choose_schemes(measured(model), 5.0)
    assert len(set(plan.schemes.values())) > 1
    reference = Reference(model, IDS)
    report = quantize_model(model, plan.schemes)
    assert report.schemes == plan.schemes
    assert reference.divergence() == pytest.approx(plan.divergence, rel=0.5)


def test_a_budget_below_all_schemes_is_an_error_with_the_least() -> None:
    with pytest.raises(ConfigError, match=r"4 bits per weight are too few: .* at least 4\.\d\d"):
        choose_schemes(measured(tiny("llama")), 4.0)
