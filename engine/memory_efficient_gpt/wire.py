"""Plain data to dataclasses and back, every field checked.

Purpose: turn settings, requests and facts into maps that msgpack can carry, and only well-typed maps back.
Does not know: frames, sockets, what the dataclasses mean.
Invariant: `unpack_record` returns a well-typed instance or raises FrameError.

The schema of a record is its dataclass's own annotations, so that a new field can't be forgotten here.
A map holds only the fields that differ from their defaults: both ends run the same version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from memory_efficient_gpt.errors import ConfigError

_Record = TypeVar("_Record")
Convert = Callable[[object], Any]


class FrameError(ValueError):
    """Data is malformed, too large or has no wire form. The conversation can't go on."""


def pack_record(record: Any) -> dict[str, Any]:
    """A dataclass as a map of its fields that differ from their defaults."""
    packed = {}
    for f in fields(record):
        value, default = getattr(record, f.name), _default(f)
        if value != default or type(value) is not type(default):
            packed[f.name] = _pack_field(value)
    return packed


def unpack_record(cls: type[_Record], raw: object) -> _Record:
    """The dataclass `cls` from such a map. Raises FrameError on an unknown, missing or ill-typed field."""
    if type(raw) is not dict:
        raise FrameError(f"{cls.__name__} must be a map, got {type(raw).__name__}.")
    conversions = _conversions(cast(type, cls))
    if unknown := [name for name in raw if name not in conversions]:
        raise FrameError(f"{cls.__name__} has unknown fields: {unknown!s:.200}.")
    try:
        return cls(**{name: conversions[name](value) for name, value in raw.items()})
    except (TypeError, FrameError, ConfigError) as error:
        raise FrameError(f"{cls.__name__} is malformed: {error}") from error


def _default(f: Field[Any]) -> object:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _pack_field(value: Any) -> Any:
    if is_dataclass(value):
        return pack_record(value)
    return dict(value) if isinstance(value, Mapping) else value


@cache
def _conversions(cls: type) -> dict[str, Convert]:
    hints = get_type_hints(cls)
    return {f.name: _conversion(hints[f.name]) for f in fields(cls)}


def _conversion(hint: Any) -> Convert:
    """How a plain value becomes `hint`: the one place that says which annotations a record may have."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
        return optional(_conversion(next(a for a in args if a is not NoneType)))
    if origin is Literal:
        return lambda raw: _one_of(args, raw)
    if origin is tuple and args[1:] == (...,):
        return as_ints if args[0] is int else _tuple_of(_conversion(args[0]))
    if origin is Mapping:
        key, value = map(_conversion, args)
        return lambda raw: {key(k): value(v) for k, v in _as_map(raw).items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda raw: unpack_record(hint, raw)
    raise TypeError(f"a record can't have a field of type {hint}.")


def as_str(raw: object) -> str:
    """`raw`, which must be text."""
    if type(raw) is not str:
        raise FrameError(f"expected text, got {type(raw).__name__}.")
    return raw


def as_int(raw: object) -> int:
    """`raw`, which must be an integer (and not a bool)."""
    if type(raw) is not int:
        raise FrameError(f"expected an integer, got {type(raw).__name__}.")
    return raw


def as_float(raw: object) -> float:
    """`raw`, which must be a number (and not a bool)."""
    if type(raw) is not float and type(raw) is not int:
        raise FrameError(f"expected a number, got {type(raw).__name__}.")
    return float(cast(float, raw))


def as_list(raw: object) -> list[Any]:
    """`raw`, which must be an array."""
    if type(raw) is not list:
        raise FrameError(f"expected an array, got {type(raw).__name__}.")
    return raw


def as_ints(raw: object) -> tuple[int, ...]:
    """`raw`, which must be an array of integers, as a tuple."""
    values = as_list(raw)
    if set(map(type, values)) - {int}:
        raise FrameError("expected an array of integers.")
    return tuple(values)


def optional(convert: Convert) -> Convert:
    """`convert`, or None for None."""
    return lambda raw: None if raw is None else convert(raw)


def _as_bool(raw: object) -> bool:
    if type(raw) is not bool:
        raise FrameError(f"expected true or false, got {type(raw).__name__}.")
    return raw


def _as_map(raw: object) -> dict[Any, Any]:
    if type(raw) is not dict:
        raise FrameError(f"expected a map, got {type(raw).__name__}.")
    return raw


def _tuple_of(convert: Convert) -> Convert:
    return lambda raw: tuple(map(convert, as_list(raw)))


def _one_of(choices: tuple[object, ...], raw: object) -> object:
    if type(raw) is not str or raw not in choices:
        raise FrameError(f"expected one of {choices}, got {raw!s:.40}.")
    return raw


_SCALARS: Final[dict[Any, Convert]] = {str: as_str, int: as_int, float: as_float, bool: _as_bool}
