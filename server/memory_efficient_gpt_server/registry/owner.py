"""The one task that owns the registry's state: events go in by an inbox, effects come out as deeds.

Purpose: leases, loads, sleeps and unloads of real engines, decided by `reducer.step`.
Does not know: HTTP, settings, worker processes (it sees engines through `LoadableEngine`).
Invariant: only the owner task changes the state; every waiter and operation is answered once, also when the
owner fails on its event or closes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from memory_efficient_gpt.errors import MegptError, ModelNotFoundError
from memory_efficient_gpt_server.models import ModelEngine
from memory_efficient_gpt_server.registry.answers import Answers
from memory_efficient_gpt_server.registry.choice import Wish
from memory_efficient_gpt_server.registry.chooser import Chooser
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
from memory_efficient_gpt_server.registry.events import (
    AdminLoad,
    AdminSleep,
    AdminUnload,
    AdminWake,
    Asked,
    Event,
    LeaseReleased,
    Left,
    Loaded,
    Patched,
    Removed,
    Tick,
    UnloadMode,
)
from memory_efficient_gpt_server.registry.happenings import happenings
from memory_efficient_gpt_server.registry.hosted import HostedModel, LoadableEngine
from memory_efficient_gpt_server.registry.journal import Journal
from memory_efficient_gpt_server.registry.kv_room import kv_bytes, kv_limit_bytes
from memory_efficient_gpt_server.registry.lease import Lease
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.managed_engine import ManagedEngine
from memory_efficient_gpt_server.registry.operations import Operation, Operations
from memory_efficient_gpt_server.registry.operations import Wish as AdminWish
from memory_efficient_gpt_server.registry.planning import LoadRequest, Plan, plan
from memory_efficient_gpt_server.registry.processes import Processes
from memory_efficient_gpt_server.registry.provisions import Provisions
from memory_efficient_gpt_server.registry.records import Policy, RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.refusals import abort_error, error_for
from memory_efficient_gpt_server.registry.states import Life, State
from memory_efficient_gpt_server.registry.tally import Tally
from memory_efficient_gpt_server.registry.variants import ModelEntry, VariantKey, find_entry

logger = logging.getLogger(__name__)

Named = str | VariantKey
"""A model's id or alias, which means the model as it is configured, or a variant that `choose` gave."""

TICK_S: Final = 0.25
"""Deadlines are kept, and dead workers noticed, with this delay at most."""


class Registry:
    """All models under a budget. Used from one event loop; `start` it there.

    budgets: by device; "cpu" must be among them. clock: monotonic, in seconds.
    """

    def __init__(
        self,
        models: Iterable[HostedModel],
        budgets: Mapping[str, Budget],
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = {model.id: model for model in models}
        self.state = RegistryState.initial(budgets, {m.id: m.entry for m in self.models.values()}, policy)
        self.tally = Tally()
        self.journal = Journal()
        self.operations = Operations(self.journal.add)
        self.changing = asyncio.Lock()
        """Held by whoever reads settings and then changes them (changes.py)."""
        self._provisions = Provisions(self.models)
        self._chooser = Chooser(self.models, self._provisions)
        self._processes = Processes(self._make_engine, self._post, self._outlive, self.tally)
        self._engines: dict[VariantKey, ManagedEngine] = {}
        self._clock = clock
        self._inbox: asyncio.Queue[tuple[Event, asyncio.Future[bool] | None]] = asyncio.Queue()
        self._answers = Answers()
        self._leases: dict[int, Lease] = {}
        self._loaded_once: set[str] = set()
        self._owner: asyncio.Task[None] | None = None
        self._first_loads: asyncio.Task[None] | None = None

    # ---- for those who serve requests

    async def choose(self, name: str, wish: Wish) -> VariantKey:
        """The variant of a model that does what is wished for. Nothing is loaded for it.

        Raises ModelNotFoundError, LoadFailedError; InvalidRequestError for what is not allowed or impossible.
        """
        return await self._chooser.choose(self.hosted(name), wish)

    def variants(self, model_id: str) -> tuple[VariantKey, ...]:
        """The model as configured, then those that may be chosen or were: each once."""
        model = self.models[model_id]
        known = [key for key in self.state.records if key.model_id == model_id]
        return tuple(dict.fromkeys((model.key, *model.choices.listed, *known)))

    def lease(self, name: Named, wait_s: float | None = None) -> Lease:
        """A lease to enter. wait_s: longest wait for a load (None: as long as anyone may; 0: none).

        Raises ModelNotFoundError. Entering raises the errors of refusals.py.
        """
        return Lease(self, self._key(name), wait_s)

    def engine(self, name: Named) -> ManagedEngine:
        """The variant's engine, loaded or not."""
        key = self._key(name)
        if key not in self._engines:
            self._engines[key] = ManagedEngine(
                str(key), lambda: self._life(key), lambda: self._processes.engine(key)
            )
        return self._engines[key]

    def engines(self, model_id: str) -> tuple[ManagedEngine, ...]:
        """Those of all variants of a model that were ever used, of the configured one first."""
        own = self.engine(model_id)
        used = [engine for key, engine in self._engines.items() if key.model_id == model_id]
        return tuple(dict.fromkeys((own, *used)))

    def needs(self, model_id: str) -> bool:
        """Whether the server isn't ready for want of it: to be loaded at start, and never was or failed; or
        loaded, and its worker is being replaced."""
        if model_id not in self.models:
            return False
        for key in self.variants(model_id):
            if self._life(key).state is State.READY and self.engine(key).state != "ready":
                return True
        if not self.models[model_id].at_start:
            return False
        return model_id not in self._loaded_once or self._life(self._key(model_id)).state is State.FAILED

    async def grant(self, lease: Lease) -> ModelEngine:
        """Wait until the lease is granted. Raises MegptError; cancelled, nothing is asked for any more."""
        estimate = (await self._provisions.of(lease.key)).estimate
        lease.id = self._answers.new_id()
        answer = self._answers.expect(lease.id, str(lease.key))
        self._leases[lease.id] = lease
        self._post(Asked(lease.id, lease.key, estimate, lease.wait_s))
        try:
            await answer
        except BaseException as error:
            del self._leases[lease.id]
            if isinstance(error, asyncio.CancelledError):
                self._answers.forget(lease.id)
                self._post(Left(lease.id, lease.key))
            raise
        return self.engine(lease.key)

    def take_back(self, lease: Lease) -> None:
        """The work under the lease has ended."""
        assert lease.id is not None, "a lease that was never granted"
        self._leases.pop(lease.id, None)
        self._post(LeaseReleased(lease.id, lease.key))

    # ---- for administrators

    def hosted(self, name: str) -> HostedModel:
        """The model of that id or alias. Raises ModelNotFoundError."""
        entry = find_entry(self.state.entries, name)
        if entry is None:
            known = ", ".join(sorted(self.models)) or "none"
            raise ModelNotFoundError(f"There is no model {name[:80]!r} here. Models: {known}.", param="model")
        return self.models[entry.id]

    def entry(self, model_id: str) -> ModelEntry:
        """The model's settings as they are now."""
        return self.state.entries.get(model_id, self.models[model_id].entry)

    def record(self, name: Named) -> VariantRecord | None:
        """What is known of a variant; None before anyone asked for it."""
        return self.state.records.get(self._key(name))

    def now_s(self) -> float:
        """The registry's clock, in seconds."""
        return self._clock()

    def age_s(self, then_s: float) -> float:
        """Seconds since a time of the registry's clock."""
        return self._clock() - then_s

    def pid(self, name: Named) -> int | None:
        """The variant's process while there is one."""
        engine = self._processes.engine(self._key(name))
        return None if engine is None else engine.pid

    async def plan(self, name: Named) -> Plan:
        """What loading the variant would mean now, and which others of its model would fit. Changes nothing.

        Raises ModelNotFoundError, LoadFailedError.
        """
        key = self._key(name)
        estimate = (await self._provisions.of(key)).estimate
        others = [other for other in self.variants(key.model_id) if other != key]
        candidates = await self._chooser.candidates(others)
        return plan(LoadRequest(key, estimate, candidates), self.state, self._clock())

    async def load(self, name: Named) -> Operation:
        """Load a model for nobody's request. The operation may have ended already.

        If the same is being done already, that is the answer. Raises ModelNotFoundError, LoadFailedError.
        """
        key = self._key(name)
        estimate = (await self._provisions.of(key)).estimate
        operation = self._answers.new_id()
        return await self._begin(operation, key, AdminLoad(operation, key, estimate))

    async def unload(
        self, name: Named, mode: UnloadMode = UnloadMode.DRAIN, deadline_s: float | None = None
    ) -> Operation:
        """Unload a model; as `load`. deadline_s: for DRAIN, seconds until the work under way is cut."""
        key, operation = self._key(name), self._answers.new_id()
        return await self._begin(operation, key, AdminUnload(operation, key, mode, deadline_s))

    async def consider(self, event: Event) -> None:
        """Have the owner take a step with an event that is not answered. Raises DrainingError."""
        waiter = self._answers.new_id()
        closed = self._answers.expect(waiter, "", log_failure=True)
        try:
            stepped = await self._post_and_wait(event, closed)
        finally:
            self._answers.forget(waiter)
        if closed.done():
            closed.result()
        if not stepped:
            raise RuntimeError(f"the registry failed on {type(event).__name__}")

    async def dismiss(self, name: str) -> None:
        """Forget a model none of whose variants is loaded or waited for.

        Raises ModelNotFoundError, ModelBusyError, DrainingError.
        """
        model, waiter = self.hosted(name), self._answers.new_id()
        answer = self._answers.expect(waiter, model.id, log_failure=True)
        self._post(Removed(waiter, model.id))
        await answer

    async def adopt(self, model: HostedModel) -> None:
        """Offer one more model, whose id must be free. Raises DrainingError."""
        assert model.id not in self.models, f"{model.id} is there already"
        self.models[model.id] = model
        self._provisions.host(model)
        await self.consider(Patched(model.entry))

    async def sleep(self, name: Named) -> Operation:
        """Put an idle model to sleep; as `load`. Raises ModelNotFoundError."""
        key, operation = self._key(name), self._answers.new_id()
        return await self._begin(operation, key, AdminSleep(operation, key))

    async def wake(self, name: Named) -> Operation:
        """Wake a sleeping model; as `load`. Raises ModelNotFoundError."""
        key, operation = self._key(name), self._answers.new_id()
        return await self._begin(operation, key, AdminWake(operation, key))

    # ---- life

    def start(self) -> None:
        """Begin to work, and to load what is to be loaded at start: the pinned first, then by priority."""
        self._owner = asyncio.create_task(self._run(), name="registry")
        self._first_loads = asyncio.create_task(self._load_first(), name="first loads")

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse everything from now on, then end all engines; they get `drain_s` seconds."""
        self._answers.close()
        for task in (self._first_loads, self._owner):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._processes.close(drain_s)

    async def _load_first(self) -> None:
        first = [model for model in self.models.values() if model.at_start]
        for model in sorted(first, key=lambda m: (not m.entry.pinned, -m.entry.priority)):
            try:
                await self.load(model.id)
            except MegptError as error:
                logger.error("%s is not loaded at start: %s", model.id, error.message)

    async def _run(self) -> None:
        next_look_s = self._clock()
        while True:
            if self._clock() >= next_look_s:
                next_look_s = self._clock() + TICK_S
                self._processes.watch()
                self._step(Tick())
            try:
                async with asyncio.timeout(max(0.0, next_look_s - self._clock())):
                    event, stepped = await self._inbox.get()
            except TimeoutError:
                continue
            went_well = self._step(event)
            if stepped is not None and not stepped.done():
                stepped.set_result(went_well)

    def _step(self, event: Event) -> bool:
        """Returns whether it was taken: a step that fails changes nothing."""
        before, now_s = self.state, self._clock()
        try:
            self.state, effects = step(before, event, now_s)
        except Exception:  # the task's boundary: the state is as it was, and the asker must not wait for ever
            logger.exception("The registry failed on %s.", type(event).__name__)
            self._answers.give(_asker(event), RuntimeError(f"the registry failed on {type(event).__name__}"))
            return False
        if isinstance(event, Loaded) and self.state.records[event.key].state is State.READY:
            self._note_loaded(event.key)
        if isinstance(event, Removed) and event.model_id not in self.state.entries:
            self._forget(event.model_id)
        self._tell(before, event, effects, now_s)
        for effect in effects:
            try:
                self._execute(effect)
            except Exception:  # as above: the other effects are still due
                logger.exception("The registry could not do %s.", effect)
        return True

    def _tell(self, before: RegistryState, event: Event, effects: tuple[Effect, ...], now_s: float) -> None:
        try:
            self.journal.add(happenings(before, event, effects, self.state, now_s, self._asked_for))
        except Exception:  # what is told of a step must not keep its effects from being done
            logger.exception("The registry could not tell of %s.", type(event).__name__)

    def _asked_for(self, waiter: int) -> VariantKey | None:
        return self._leases[waiter].key if waiter in self._leases else None

    def _execute(self, effect: Effect) -> None:
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
                self._processes.grow_kv(key, kv_limit_bytes(self.state, key))
            case MoveKv(key):
                had_bytes = kv_bytes(self.state.ledger, key)
                self._processes.shrink_kv(key, kv_limit_bytes(self.state, key), had_bytes)

    async def _begin(self, operation: int, key: VariantKey, wish: AdminWish) -> Operation:
        """Post an administrator's wish and wait until it was considered; not if the same one goes on."""
        same = self.operations.running(wish)
        if same is not None:
            return same
        answer = self._answers.expect(operation, str(key), log_failure=True)
        begun = self.operations.begin(wish, answer)
        await self._post_and_wait(wish, answer)
        return begun

    async def _post_and_wait(self, event: Event, answer: asyncio.Future[None]) -> bool:
        """Until the owner has taken its step, or the answer is there, as when it closes.

        Returns whether the step was taken and did not fail.
        """
        stepped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._post(event, stepped)
        either: list[asyncio.Future[Any]] = [stepped, answer]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return stepped.done() and stepped.result()

    def _post(self, event: Event, stepped: asyncio.Future[bool] | None = None) -> None:
        if not self._answers.closed:
            self._inbox.put_nowait((event, stepped))

    # ---- engines

    def _make_engine(self, key: VariantKey) -> LoadableEngine:
        provision = self._provisions.known(key)
        assert provision is not None, "nobody can ask for what was not provided for"
        return provision.make_engine()

    def _key(self, name: Named) -> VariantKey:
        """Raises ModelNotFoundError."""
        return name if isinstance(name, VariantKey) else self.hosted(name).key

    def _note_loaded(self, key: VariantKey) -> None:
        if key == self.models[key.model_id].key:
            self._loaded_once.add(key.model_id)

    def _forget(self, model_id: str) -> None:
        if self.models.pop(model_id, None) is None:
            return
        for key in [key for key in self._engines if key.model_id == model_id]:
            del self._engines[key]
        self._loaded_once.discard(model_id)
        self._provisions.forget(model_id)

    def _life(self, key: VariantKey) -> Life:
        record = self.state.records.get(key)
        return Life() if record is None else record.life

    def _outlive(self, key: VariantKey, engine: LoadableEngine) -> None:
        self.engine(key).outlived(engine)


def _asker(event: Event) -> int | None:
    match event:
        case Asked(waiter):
            return waiter
        case (
            AdminLoad(operation)
            | AdminUnload(operation)
            | AdminSleep(operation)
            | AdminWake(operation)
            | Removed(operation)
        ):
            return operation
        case _:
            return None
