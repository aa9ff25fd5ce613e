"""Which scheme each weight gets.

Purpose: plans from one scheme, from patterns, and their table for people.
Does not know: how well a scheme fits a layer (see sensitivity.py), how weights are quantized.
Invariant: a pattern that matches nothing is an error, not a typo that goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

from memory_efficient_gpt.errors import ConfigError, UnsupportedModelError
from memory_efficient_gpt.quantization.bitsandbytes import left_alone, unsuited
from memory_efficient_gpt.quantization.layers import Layer
from memory_efficient_gpt.quantization.scheme import INT8, UNQUANTIZED, Scheme, parse_scheme

Plan = Mapping[str, Scheme]
"""A scheme for each weight by the name of its first module."""

_WHOLE_MATRIX_ROLES: Final = ("embedding", "head")


def uniform_plan(
    layers: Sequence[Layer],
    scheme: Scheme,
    *,
    outer: Scheme = INT8,
    rules: Mapping[str, Scheme] | None = None,
) -> dict[str, Scheme]:
    """`scheme` for every layer, `outer` for embedding and head, `rules` (see `pins`) before both.

    Layers that bitsandbytes cannot hold stay as they are when `scheme` is its.
    Raises ConfigError for a pattern that matches no layer, UnsupportedModelError if no layer takes `scheme`.
    """
    pinned = pins(layers, rules or {})
    plan: dict[str, Scheme] = {}
    for layer in layers:
        whole = layer.role in _WHOLE_MATRIX_ROLES and scheme.kind != "none"
        stays = scheme.by_bitsandbytes and not whole and unsuited(layer, scheme)
        plan[layer.name] = pinned.get(layer.name, outer if whole else UNQUANTIZED if stays else scheme)
    if scheme.by_bitsandbytes and scheme not in plan.values():
        reasons = "; ".join(left_alone(layers, scheme))
        raise UnsupportedModelError(f"no layer of this model can be {scheme}: {reasons}. Use int4 or int8.")
    return plan


def pins(layers: Sequence[Layer], rules: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """What `rules` (pattern -> scheme) say of layers, by layer name; layers that no rule names are absent.

    A pattern is matched against a layer's names as the shell does (`*.down_proj`); the first one counts.
    Raises ConfigError for a pattern that matches no layer.
    """
    pinned: dict[str, Scheme] = {}
    unmatched = dict.fromkeys(rules)
    for layer in layers:
        matching = [p for p in rules if any(fnmatchcase(name, p) for name in layer.names)]
        if matching:
            pinned[layer.name] = rules[matching[0]]
        for pattern in matching:
            unmatched.pop(pattern, None)
    if unmatched:
        some = ", ".join(layer.name for layer in layers[:3])
        raise ConfigError(
            [f"pattern {p!r} matches no layer of this model (it has {some}, ...)." for p in unmatched]
        )
    return pinned


def parse_rules(texts: Sequence[str]) -> dict[str, Scheme]:
    """`PATTERN=SCHEME` texts as rules. Raises ConfigError with every problem."""
    rules: dict[str, Scheme] = {}
    problems: list[str] = []
    for text in texts:
        pattern, equals, name = text.partition("=")
        if not equals or not pattern:
            problems.append(f"rule {text!r} must be PATTERN=SCHEME, for example '*.down_proj=int8'.")
            continue
        try:
            scheme = parse_scheme(name)
        except ConfigError as error:
            problems += error.problems
            continue
        if rules.setdefault(pattern, scheme) != scheme:
            problems.append(
                f"pattern {pattern!r} has two rules, {rules[pattern]} and {scheme}; a layer takes the first "
                "that matches. Leave one out."
            )
    if problems:
        raise ConfigError(problems)
    return rules


def bits_per_weight(layers: Sequence[Layer], plan: Plan) -> float:
    """Stored bits by weights over all planned layers, scales counted."""
    bits = weights = 0.0
    for layer in layers:
        n, k = layer.shape
        bits += plan.get(layer.name, UNQUANTIZED).bits_per_weight(n, k) * n * k
        weights += n * k
    return bits / weights if weights else 0.0
