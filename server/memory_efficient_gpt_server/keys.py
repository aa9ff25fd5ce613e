"""API keys as operators write them.

Purpose: which keys may be configured, and the digest by which one is recognised.
Does not know: settings, requests, whose key it is.
Invariant: a message about a key never holds it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

LEAST_KEY_CHARACTERS: Final = 16
_HASHED_KEY: Final = re.compile(r"sha256:([0-9a-f]{64})")


def key_digest(key: str) -> bytes:
    """SHA-256 of a key as configured: plain, or already hashed as sha256:<hex>."""
    hashed = _HASHED_KEY.fullmatch(key)
    return bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(key.encode()).digest()


def key_problems(named_keys: Sequence[tuple[str, str]]) -> list[str]:
    """What is wrong with keys, given as (what it is called, key)."""
    problems = []
    for name, key in named_keys:
        if key.startswith("sha256:"):
            if not _HASHED_KEY.fullmatch(key):
                problems.append(f"{name} must be sha256: and 64 lower-case hex digits.")
        elif not key.isascii() or not key.isprintable() or " " in key or len(key) < LEAST_KEY_CHARACTERS:
            problems.append(
                f"{name} has {len(key)} characters; it must have at least {LEAST_KEY_CHARACTERS}, "
                "all printable ASCII and none a space. Make one with `openssl rand -hex 32`."
            )
    if len({key_digest(key) for _, key in named_keys}) < len(named_keys):
        problems.append("api_keys and admin_key must all differ.")
    return problems
