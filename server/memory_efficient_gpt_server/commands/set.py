"""`megpt set`: change settings of a running server's model.

Purpose: the command's options and help, and values from text.
Does not know: HTTP, what follows from a change.
Invariant: a value is sent as it was written or refused here; nothing is rounded or guessed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_server_options,
    byte_size,
    new_command,
)

_EXAMPLES = """\
  megpt set writer pinned=true                          stays loaded once it is, and can't be unloaded
  megpt set writer pinned=false ttl_s=600               leaves when idle for ten minutes
  megpt set writer ttl_s=null                           stays until others need its room
  megpt set draft priority=-1 min_residency_s=30
  megpt set draft kv_soft_limit_bytes=64MiB kv_hard_limit_bytes=512MiB
  megpt set draft kv_hard_limit_bytes=null              its KV cache may grow as far as it can again

Settings:

  pinned                true or false: never evicted; pinning loads nothing, `megpt load` does
  ttl_s                 idle seconds after which it is unloaded; null: none
  min_residency_s       seconds after a load in which it is not evicted for others
  priority              an integer; greater ones are loaded first and evicted last
  kv_soft_limit_bytes   KV cache that it keeps when others want some, and begins with when it is loaded next:
                        bytes or 64MiB, 1.5GB ...; null: what it was loaded with
  kv_hard_limit_bytes   most KV cache that it may have; if it has more it gives back what no request holds
                        now, and the rest as requests end; null: no limit of its own

They hold until the server ends; those that should last belong into its settings. Exit code: 0 changed,
1 refused, 2 no such setting or value.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "set", summary="change settings of a running server's model", examples=_EXAMPLES
    )
    parser.add_argument("model", metavar="ID", help="one of those that `megpt models` lists")
    parser.add_argument("settings", metavar="NAME=VALUE", nargs="+", type=setting, help="see below")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Change, and say how it is now. Raises ConfigError."""
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt_server.commands.admin_client import admin_client
    from memory_efficient_gpt_server.commands.tables import one_line

    names = [name for name, _ in args.settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"{', '.join(twice)} stands twice; give it once."])
    with admin_client(args) as client:
        model = client.change(args.model, dict(args.settings))
    now = ", ".join(f"{name}={_written(model[name])}" for name in _SETTINGS)
    print(f"{one_line(model['id'])}: {one_line(model['state'])}, {now}")
    return 0


def setting(text: str) -> tuple[str, Any]:
    """A name and its value. Raises ArgumentTypeError."""
    name, equals, value = text.partition("=")
    if not equals or name not in _SETTINGS:
        known = ", ".join(_SETTINGS)
        raise argparse.ArgumentTypeError(f"{text!r} sets nothing; write NAME=VALUE with one of {known}")
    read, wanted = _SETTINGS[name]
    try:
        return name, read(value.strip())
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{name} must be {wanted}, got {value!r}") from None


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("no time")
    return value


def _seconds_or_null(text: str) -> float | None:
    return None if text == "null" else _seconds(text)


def _bytes_or_null(text: str) -> int | None:
    if text == "null":
        return None
    try:
        return int(text) if text.isdecimal() else byte_size(text)
    except argparse.ArgumentTypeError:
        raise ValueError("no size") from None


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int) else f"{value:g}"


_SIZE: Final = "bytes, a size such as 64MiB, or null"

_SETTINGS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = MappingProxyType(
    {
        "pinned": (_truth, "true or false"),
        "ttl_s": (_seconds_or_null, "a number of seconds or null"),
        "min_residency_s": (_seconds, "a number of seconds"),
        "priority": (int, "an integer"),
        "kv_soft_limit_bytes": (_bytes_or_null, _SIZE),
        "kv_hard_limit_bytes": (_bytes_or_null, _SIZE),
    }
)
