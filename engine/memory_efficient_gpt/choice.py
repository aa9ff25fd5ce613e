"""What an optimization that was asked for "if available" came to.

Purpose: one answer of the functions named `use_..._if_available`.
Does not know: what was chosen from.
Invariant: a choice always has a reason.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """used: the implementation at work now; available: whether it is what was asked for; reason: why."""

    used: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.used}: {self.reason}"
