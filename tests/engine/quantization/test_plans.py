"""Plans: defaults, patterns, and patterns that match nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.layers import Layer
from memory_efficient_gpt.quantization.modules import QuantizedLinear
from memory_efficient_gpt.quantization.plans import bits_per_weight, parse_rules, uniform_plan
from memory_efficient_gpt.quantization.scheme import INT4, INT8, UNQUANTIZED, parse_scheme


def layers() -> list[Layer]:
    module = nn.Linear(64, 32)
    names = {"embed": "embedding", "layers.0.q": "linear", "layers.0.down": "linear", "head": "head"}
    return [
        Layer(name, role, (32, 64), [(module, QuantizedLinear)], names=[name])  # type: ignore[arg-type]
        for name, role in names.items()
    ]


def test_both_ends_get_eight_bits_unless_told_otherwise() -> None:
    plan = uniform_plan(layers(), INT4)
    assert plan == {"embed": INT8, "layers.0.q": INT4, "layers.0.down": INT4, "head": INT8}
    assert set(uniform_plan(layers(), INT4, outer=INT4).values()) == {INT4}
    assert set(uniform_plan(layers(), UNQUANTIZED).values()) == {UNQUANTIZED}


def test_the_first_matching_rule_counts() -> None:
    rules = parse_rules(["*.down=int8", "layers.*=int4-g128", "head=bf16"])
    plan = uniform_plan(layers(), INT4, rules=rules)
    assert plan["layers.0.down"] == INT8
    assert plan["layers.0.q"] == parse_scheme("int4-g128")
    assert plan["head"] == UNQUANTIZED


def test_a_pattern_without_a_layer_is_an_error_with_layers_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'\*\.dwn' matches no layer.*it has embed, layers\.0\.q"):
        uniform_plan(layers(), INT4, rules={"*.dwn": INT8})


def test_every_problem_of_rules_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(["int8", "=int8", "a=int9"])
    assert len(caught.value.problems) == 3


def test_two_rules_of_one_pattern_are_refused_unless_they_say_the_same() -> None:
    assert parse_rules(["a=int8", "b=int4", "a=int8"]) == {"a": INT8, "b": parse_scheme("int4")}
    with pytest.raises(ConfigError, match=r"pattern 'a' has two rules, int8 and bf16; .* first that matches"):
        parse_rules(["a=int8", "a=bf16"])


def test_bits_are_those_of_all_layers_together() -> None:
    plan = {"embed": INT8, "layers.0.q": INT4, "layers.0.down": INT4, "head": UNQUANTIZED}
    assert bits_per_weight(layers(), plan) == pytest.approx((8.25 + 4.5 + 4.5 + 16) / 4)
    assert torch.is_tensor(layers()[0].weight())
