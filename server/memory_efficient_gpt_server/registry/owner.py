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
from typing import Final

from memory_efficient_gpt.errors import ModelNotFoundError
from memory_efficient_gpt_server.models import ModelEngine
from memory_efficient_gpt_server.registry.answers import Answers
from memory_efficient_gpt_server.registry.choice import Wish
from memory_efficient_gpt_server.registry.chooser import Chooser
from memory_efficient_gpt_server.registry.deeds import Deeds
from memory_efficient_gpt_server.registry.effects import Effect
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
from memory_efficient_gpt_server.registry.first_loads import FirstLoads
from memory_efficient_gpt_server.registry.happenings import happenings, struck_before_load
from memory_efficient_gpt_server.registry.hosted import HostedModel, LoadableEngine
from memory_efficient_gpt_server.registry.inbox import Inbox, asker
from memory_efficient_gpt_server.registry.joint_planning import JointPlan, plan_together
from memory_efficient_gpt_server.registry.journal import Journal
from memory_efficient_gpt_server.registry.lease import Lease
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.managed_engine import ManagedEngine, ManagedEngines
from memory_efficient_gpt_server.registry.operations import Operation, Operations
from memory_efficient_gpt_server.registry.planning import LoadRequest, Plan, plan
from memory_efficient_gpt_server.registry.processes import Processes
from memory_efficient_gpt_server.registry.provisions import Provisions
from memory_efficient_gpt_server.registry.records import Policy, RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.states import Life, State
from memory_efficient_gpt_server.registry.tally import Tally
from memory_efficient_gpt_server.registry.variants import Estimate, ModelEntry, VariantKey, find_entry
from memory_efficient_gpt_server.registry.wishes import Wishes

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
        self.provisions = Provisions(self.models)
        self._chooser = Chooser(self.models, self.provisions)
        self._clock = clock
        self._inbox = Inbox()
        self._answers = Answers()
        self._leases: dict[int, Lease] = {}
        self._processes = Processes(self._make_engine, self._post, self._outlived, self.tally)
        self._engines = ManagedEngines(self._life, self._processes.engine)
        self._deeds = Deeds(self._processes, self._answers, self._leases)
        self._wishes = Wishes(self._answers, self._inbox, self.operations)
        self._first_loads = FirstLoads(self.models.values())
        self._tasks: list[asyncio.Task[None]] = []

    # ---- for those who serve requests

    async def choose(self, name: str, wish: Wish) -> VariantKey:
        """The variant of a model that does what is wished for. Nothing is loaded for it.

        Raises ModelNotFoundError, LoadFailedError; InvalidRequestError for what is not allowed or impossible.
        """
        return await self._chooser.choose(self.hosted(name), wish)

    def variants(self, model_id: str) -> tuple[VariantKey, ...]:
        """The model as configured, then those that may be chosen or were: each once.

        Raises ModelNotFoundError.
        """
        model = self.hosted(model_id)
        known = [key for key in self.state.records if key.model_id == model_id]
        return tuple(dict.fromkeys((model.key, *model.choices.listed, *known)))

    def lease(self, name: Named, wait_s: float | None = None) -> Lease:
        """A lease to enter. wait_s: longest wait for a load (None: as long as anyone may; 0: none).

        Raises ModelNotFoundError. Entering raises the errors of refusals.py.
        """
        return Lease(self, self._key(name), wait_s)

    def engine(self, name: Named) -> ManagedEngine:
        """The variant's engine, loaded or not."""
        return self._engines.of(self._key(name))

    def engines(self, model_id: str) -> tuple[ManagedEngine, ...]:
        """Those of all variants of a model that were ever used, of the configured one first."""
        return tuple(dict.fromkeys((self.engine(model_id), *self._engines.of_model(model_id))))

    def needs(self, model_id: str) -> bool:
        """Whether the server isn't ready for want of it: to be loaded at start, and never was or failed; or
        loaded, and its worker is being replaced."""
        if model_id not in self.models:
            return False
        for key in self.variants(model_id):
            if self._life(key).state is State.READY and self.engine(key).state != "ready":
                return True
        key = self.models[model_id].key
        return self._first_loads.due(key, self._life(key).state)

    async def grant(self, lease: Lease) -> ModelEngine:
        """Wait until the lease is granted. Raises MegptError; cancelled, nothing is asked for any more."""
        estimate, problem = await self._looked_at(lease.key)
        lease.id = self._answers.new_id()
        answer = self._answers.expect(lease.id, str(lease.key))
        self._leases[lease.id] = lease
        self._processes.look_at(lease.key)  # a worker that has died since the last look takes no requests
        asked_s, cold = self._clock(), self.engine(lease.key).state != "ready"
        self._post(Asked(lease.id, lease.key, estimate, lease.wait_s, problem))
        try:
            await answer
        except BaseException as error:
            del self._leases[lease.id]
            if isinstance(error, asyncio.CancelledError):
                self._answers.forget(lease.id)
                self._post(Left(lease.id, lease.key))
            raise
        finally:
            if cold and lease.key.model_id in self.models:
                self.tally.waited(lease.key.model_id, self._clock() - asked_s)
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

    async def present_needs(self, model_id: str) -> dict[VariantKey, Estimate]:
        """What a model's variants take that are known, and the model as configured, as far as it is known.

        Raises LoadFailedError.
        """
        own = self.models[model_id].key
        first = {own: (await self.provisions.of(own)).estimate}
        return first | {r.key: r.needs for r in self.state.records.values() if r.key.model_id == model_id}

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
        return plan(await self._load_request(self._key(name)), self.state, self._clock())

    async def plan_together(self, keys: Iterable[VariantKey]) -> JointPlan:
        """What loading all these different variants would mean now. Changes nothing.

        Raises ModelNotFoundError, LoadFailedError.
        """
        requests = [await self._load_request(key) for key in keys]
        return plan_together(requests, self.state, self._clock())

    async def _load_request(self, key: VariantKey) -> LoadRequest:
        """With the other variants of its model as candidates."""
        estimate = (await self.provisions.of(key)).estimate
        others = [other for other in self.variants(key.model_id) if other != key]
        return LoadRequest(key, estimate, await self._chooser.candidates(others))

    async def load(self, name: Named, *, may_evict: bool = True) -> Operation:
        """Load a model for nobody's request. The operation may have ended already.

        may_evict: whether others may leave or sleep for it. If the same is being done already, that is the
        answer. Raises ModelNotFoundError.
        """
        key = self._key(name)
        estimate, problem = await self.provisions.estimate(key)
        return await self._wishes.begin(
            lambda operation: AdminLoad(operation, key, estimate, may_evict, problem)
        )

    async def unload(
        self, name: Named, mode: UnloadMode = UnloadMode.DRAIN, deadline_s: float | None = None
    ) -> Operation:
        """Unload a model; as `load`. deadline_s: for DRAIN, seconds until the work under way is cut."""
        key = self._key(name)
        return await self._wishes.begin(lambda operation: AdminUnload(operation, key, mode, deadline_s))

    async def consider(self, event: Event) -> None:
        """Have the owner take a step with an event that is not answered. Raises DrainingError."""
        await self._wishes.consider(event)

    async def dismiss(self, name: str) -> None:
        """Forget a model none of whose variants is loaded or waited for.

        Raises ModelNotFoundError, ModelBusyError, DrainingError.
        """
        await self._wishes.dismiss(self.hosted(name).id)

    async def adopt(self, model: HostedModel) -> None:
        """Offer one more model, whose id must be free. Raises DrainingError."""
        assert model.id not in self.models, f"{model.id} is there already"
        self.models[model.id] = model
        self.provisions.host(model)
        await self.consider(Patched(model.entry))

    async def sleep(self, name: Named) -> Operation:
        """Put an idle model to sleep; as `load`. Raises ModelNotFoundError."""
        key = self._key(name)
        return await self._wishes.begin(lambda operation: AdminSleep(operation, key))

    async def wake(self, name: Named) -> Operation:
        """Wake a sleeping model; as `load`. Raises ModelNotFoundError."""
        key = self._key(name)
        return await self._wishes.begin(lambda operation: AdminWake(operation, key))

    async def cancel(self, operation: Operation) -> None:
        """Call an operation off.

        Raises WrongStateError if it has ended or can't be stopped, DrainingError.
        """
        await self._wishes.cancel(operation)

    # ---- life

    def start(self) -> None:
        """Begin to work, and to load what is to be loaded at start: the pinned first, then by priority."""
        self._tasks = [
            asyncio.create_task(self._run(), name="registry"),
            asyncio.create_task(self._first_loads.begin(self.load), name="first loads"),
        ]

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse everything from now on, then end all engines; they get `drain_s` seconds."""
        self._answers.close()
        self._inbox.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._processes.close(drain_s)

    async def _run(self) -> None:
        next_look_s = self._clock()
        while True:
            if self._clock() >= next_look_s:
                next_look_s = self._clock() + TICK_S
                self._processes.watch()
                self._step(Tick())
            posted = await self._inbox.take(next_look_s - self._clock())
            if posted is None:
                continue
            went_well = self._step(posted.event)
            if posted.stepped is not None and not posted.stepped.done():
                posted.stepped.set_result(went_well)

    def _step(self, event: Event) -> bool:
        """Returns whether it was taken: a step that fails changes nothing."""
        before, now_s = self.state, self._clock()
        try:
            self.state, effects = step(before, event, now_s)
        except Exception:  # the task's boundary: the state is as it was, and the asker must not wait for ever
            logger.exception("The registry failed on %s.", type(event).__name__)
            self._answers.give(asker(event), RuntimeError(f"the registry failed on {type(event).__name__}"))
            return False
        if isinstance(event, Loaded) and self.state.records[event.key].state is State.READY:
            self._first_loads.loaded(event.key)
        if isinstance(event, Asked | AdminLoad) and struck_before_load(before, event, self.state):
            self.tally.failed(event.key.model_id)
        if isinstance(event, Removed) and event.model_id not in self.state.entries:
            self._forget(event.model_id)
        self._tell(before, event, effects, now_s)
        self._deeds.do(effects, self.state)
        return True

    def _tell(self, before: RegistryState, event: Event, effects: tuple[Effect, ...], now_s: float) -> None:
        try:
            self.journal.add(happenings(before, event, effects, self.state, now_s, self._asked_for))
        except Exception:  # what is told of a step must not keep its effects from being done
            logger.exception("The registry could not tell of %s.", type(event).__name__)

    def _asked_for(self, waiter: int) -> VariantKey | None:
        return self._leases[waiter].key if waiter in self._leases else None

    def _post(self, event: Event) -> None:
        self._inbox.post(event)

    # ---- engines

    def _make_engine(self, key: VariantKey) -> LoadableEngine:
        provision = self.provisions.known(key)
        assert provision is not None, "nobody can ask for what was not provided for"
        return provision.make_engine()

    async def _looked_at(self, key: VariantKey) -> tuple[Estimate, str | None]:
        """As Provisions.estimate; the files of what has failed are not looked at before its pause is over."""
        record = self.state.records.get(key)
        if record is not None and (record.life.retry_at_s or 0.0) > self._clock():
            return record.estimate, None
        return await self.provisions.estimate(key)

    def _key(self, name: Named) -> VariantKey:
        """Raises ModelNotFoundError."""
        return name if isinstance(name, VariantKey) else self.hosted(name).key

    def _forget(self, model_id: str) -> None:
        if self.models.pop(model_id, None) is None:
            return
        self._engines.forget(model_id)
        self._first_loads.forget(model_id)
        self.provisions.forget(model_id)

    def _life(self, key: VariantKey) -> Life:
        record = self.state.records.get(key)
        return Life() if record is None else record.life

    def _outlived(self, key: VariantKey, engine: LoadableEngine) -> None:
        self._engines.outlived(key, engine)
