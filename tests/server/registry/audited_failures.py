"""The auditor's account of failures.

Purpose: prove that nobody is refused for failures that were none or were made good, nor sooner let in than
told.
Does not know: states, memory.
Invariant: as the auditor's: the first broken rule raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from memory_efficient_gpt_server.registry.events import (
    AdminUnload,
    Event,
    Loaded,
    LoadFailed,
    Woke,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.load_queue import FailureRule
from memory_efficient_gpt_server.registry.records import RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey


@dataclass(slots=True)
class Failures:
    """When loads failed since the last good one, and when workers were given up that served."""

    loads_s: dict[VariantKey, list[float]] = field(default_factory=dict)
    crashes_s: dict[VariantKey, list[float]] = field(default_factory=dict)

    def before(self, event: Event, phases: Mapping[VariantKey, str], now_s: float) -> None:
        """Book what the event tells of a worker in its phase.

        Whether a model that was loaded or woken has room shows afterwards; until then it counts as failed.
        """
        match event:
            case LoadFailed(key) | Loaded(key) | Woke(key) if phases[key] != "ending":
                self.loads_s.setdefault(key, []).append(now_s)
            case WorkerDied(key) if phases[key] == "loading":
                self.loads_s.setdefault(key, []).append(now_s)
            case WorkerDied(key) if phases[key] in ("ready", "replacing"):
                self.crashes_s.setdefault(key, []).append(now_s)
            case _:
                pass

    def after(self, event: Event, old: RegistryState, new: RegistryState) -> None:
        """Forget what was made good, or forgiven by an administrator, or is of a forgotten variant."""
        match event:
            case Loaded(key) if old.records[key].state is State.LOADING and _had_room(new.records[key]):
                self.loads_s.pop(key, None)
            case Woke(key) if old.records[key].state is State.WAKING and _had_room(new.records[key]):
                self.loads_s[key].pop()
            case AdminUnload(_, key) if key in old.records and old.records[key].state is State.FAILED:
                self.loads_s.pop(key, None)
                self.crashes_s.pop(key, None)
            case _:
                pass
        for books in (self.loads_s, self.crashes_s):
            for key in [key for key in books if key not in new.records]:
                del books[key]

    def check_refusal(self, key: VariantKey, retry_s: float | None, rule: FailureRule, now_s: float) -> None:
        """Somebody was refused for failures and told when a request is tried again."""
        recent = rule.recent(tuple(sorted(self.loads_s.get(key, []) + self.crashes_s.get(key, []))), now_s)
        assert self.loads_s.get(key) or len(recent) >= rule.most, f"{key} is refused, though nothing failed"
        assert retry_s is not None, f"{key} is refused without a time"
        if len(recent) >= rule.most:
            least_s = recent[len(recent) - rule.most] + rule.expiry_s - now_s
            assert retry_s >= least_s - 1e-6, f"{key} is tried again {least_s - retry_s:.1f} s too soon"


def _had_room(record: VariantRecord) -> bool:
    """Whether it was let stay; it may have been told to leave for another reason in the same step."""
    return record.state is not State.UNLOADING or not (record.life.reason or "").startswith("it took")
