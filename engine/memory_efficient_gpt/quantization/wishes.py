"""What a user of the library asks of a model's weights.

Purpose: check it, tell whether weights that are quantized already are what was asked for.
Does not know: models, how weights are quantized.
Invariant: whatever is asked for is done or refused; all problems of the arguments are told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.naming import name_of
from memory_efficient_gpt.quantization.rounding import Rounding, check_rounding
from memory_efficient_gpt.quantization.scheme import INT4, INT8, UNQUANTIZED, Scheme, parse_scheme

_BY_BITS: Final = {4: INT4, 8: INT8, 16: UNQUANTIZED}
_LEAVE_OUT: Final = "or give the checkpoint it was made from."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wish:
    """How weights shall be stored. scheme None: as a quantized checkpoint has them, else a default.

    exact: whether `scheme` was named; else any schemes of as many bits will do.
    """

    scheme: Scheme | None = None
    exact: bool = False
    rounding: Rounding = "search"
    rules: Mapping[str, Scheme] = field(default_factory=dict)

    def __str__(self) -> str:
        asked = [str(self.scheme)] if self.scheme is not None else []
        return " with ".join([*asked, "other rules"] if self.rules else asked)

    def fits(self, present: Collection[Scheme]) -> bool:
        """Whether weights that are stored as all of `present` are what is wished for."""
        if self.scheme is None:
            return True
        if self.exact:
            return set(present) == {self.scheme}
        return {scheme.bits for scheme in present} == {self.scheme.bits}

    def require_present(self, present: Collection[Scheme], model: str) -> None:
        """Raises ConfigError if a model that is quantized already, as `present` or in an unknown way, is not
        as wished."""
        if self.rules or not self.fits(present):
            name = name_of(present)
            how = f"as {name}" if name is not None else "in a format that is kept as it is"
            raise ConfigError(
                [f"{model} is quantized already, {how}; {self} was asked for. "
                 f"Leave bits, scheme and rules out, {_LEAVE_OUT}"]
            )  # fmt: skip
        if self.rounding != "search":
            raise ConfigError(
                [f"{model} is quantized already, so that rounding {self.rounding!r} has nothing to round. "
                 f"Leave it out, {_LEAVE_OUT}"]
            )  # fmt: skip

    def require_use_of_rounding(self, scheme: Scheme) -> None:
        """Raises ConfigError if nothing would be rounded as wished. scheme: that of most layers."""
        schemes = [s for s in (scheme, *self.rules.values()) if s.kind != "none"]
        if self.rounding == "search":
            return
        if not schemes:
            raise ConfigError(
                [f"rounding {self.rounding!r} is for weights that are quantized, and none are. "
                 "Leave it out, or give bits or scheme."]
            )  # fmt: skip
        with_offsets = [s for s in schemes if s.kind == "int" and not s.symmetric]
        check_rounding((with_offsets or schemes)[0], self.rounding)


def wish(bits: Any, scheme: Any, rounding: Any, rules: Any) -> Wish:
    """Check what a user wrote. Raises ConfigError with every problem."""
    problems: list[str] = []
    if bits is not None and scheme is not None:
        problems.append(f"bits {bits} and scheme {scheme!r} both say how weights are stored; give one.")
    if bits is not None and (type(bits) is not int or bits not in _BY_BITS):
        problems.append(f"bits must be 4, 8 or 16 (not quantized), got {bits!r}.")
        bits = None
    found = _BY_BITS.get(bits)
    if scheme is not None:
        found = _collect(problems, "", lambda: _scheme(scheme, "scheme"))
    parsed = _rules(rules, problems)
    if rounding == "gptq":
        problems.append(
            "rounding 'gptq' runs the model on a text: `megpt quantize MODEL --rounding gptq --out FOLDER` "
            "does, and from_pretrained(FOLDER) loads the result."
        )
    offset_scheme = parse_scheme("int4-asym-g64")  # it has every rounding
    _collect(problems, "", lambda: check_rounding(offset_scheme, rounding))
    if problems:
        raise ConfigError(problems)
    return Wish(found, scheme is not None, rounding, parsed)


def _rules(rules: Any, problems: list[str]) -> dict[str, Scheme]:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping) or not all(isinstance(pattern, str) for pattern in rules):
        problems.append(
            "rules must map patterns of layers' names to schemes, as {'*.down_proj': 'int8'} does, "
            f"got {rules!r}."
        )
        return {}
    parsed: dict[str, Scheme] = {}
    for pattern, rule in rules.items():
        if isinstance(rule, Scheme):
            parsed[pattern] = rule
            continue
        where = f"rules[{pattern!r}]"
        prefix = f"{where}: " if isinstance(rule, str) else ""
        scheme = _collect(problems, prefix, lambda r=rule, w=where: _scheme(r, w))  # type: ignore[misc]
        if scheme is not None:
            parsed[pattern] = scheme
    return parsed


def _scheme(name: Any, where: str) -> Scheme:
    if not isinstance(name, str):
        raise ConfigError([f"{where} must be the name of a scheme, such as 'int4-g128', got {name!r}."])
    return parse_scheme(name)


def _collect(problems: list[str], prefix: str, find: Callable[[], T]) -> T | None:
    """What `find` gives, or None and its problems."""
    try:
        return find()
    except ConfigError as error:
        problems += [prefix + problem for problem in error.problems]
        return None
