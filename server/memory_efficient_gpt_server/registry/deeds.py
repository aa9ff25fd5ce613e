"""Effects of a step, done.

Purpose: what the owner does with each effect: answers, aborted leases, orders to processes.
Does not know: events, why an effect was decided.
Invariant: an effect that can't be done keeps no other from being done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from memory_efficient_gpt_server.registry.answers import Answers
from memory_efficient_gpt_server.registry.effects import (
    Abort,
    Effect,
    Finish,
    GrantLease,
    GrowKv,
    MoveKv,
    Refuse,
    StartLoad,
    StartSleep,
    StartUnload,
    StartWake,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes, kv_limit_bytes
from memory_efficient_gpt_server.registry.lease import Lease
from memory_efficient_gpt_server.registry.processes import Processes
from memory_efficient_gpt_server.registry.records import RegistryState
from memory_efficient_gpt_server.registry.refusals import abort_error, error_for

logger = logging.getLogger(__name__)


class Deeds:
    """leases: those that were asked for and not given back, by id."""

    def __init__(self, processes: Processes, answers: Answers, leases: Mapping[int, Lease]) -> None:
        self._processes = processes
        self._answers = answers
        self._leases = leases

    def do(self, effects: Iterable[Effect], state: RegistryState) -> None:
        """All of a step whose state came out as `state`, in their order."""
        for effect in effects:
            try:
                self._do(effect, state)
            except Exception:  # the owner's boundary: the other effects are still due
                logger.exception("The registry could not do %s.", effect)

    def _do(self, effect: Effect, state: RegistryState) -> None:
        match effect:
            case GrantLease(waiter) | Finish(waiter):
                self._answers.give(waiter)
            case Refuse(waiter):
                self._answers.give(waiter, error_for(effect, self._answers.model_id(waiter)))
            case Abort(lease, key, reason):
                if lease in self._leases:
                    self._leases[lease].abort(abort_error(reason, str(key)))
            case StartLoad(key, reserved):
                logger.info("Loading %s.", key)
                self._processes.load(key, reserved)
            case StartUnload(key, reason):
                logger.info("Unloading %s (%s).", key, reason)
                self._processes.unload(key, reason)
            case StartSleep(key, reason):
                logger.info("Putting %s to sleep (%s).", key, reason)
                self._processes.sleep(key, reason)
            case StartWake(key, size):
                logger.info("Waking %s.", key)
                self._processes.wake(key, size)
            case GrowKv(key):
                self._processes.grow_kv(key, kv_limit_bytes(state, key))
            case MoveKv(key):
                self._processes.shrink_kv(key, kv_limit_bytes(state, key), kv_bytes(state.ledger, key))
