"""Operations: one for a wish, kept for a while, awaited by any number."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.errors import (
    ModelBusyError,
    ModelUnloadingError,
    OperationCancelledError,
    OperationNotFoundError,
    WrongStateError,
)
from memory_efficient_gpt_server.registry.events import AdminLoad, AdminUnload, UnloadMode
from memory_efficient_gpt_server.registry.happenings import Happening
from memory_efficient_gpt_server.registry.operation_view import operation_view
from memory_efficient_gpt_server.registry.operations import MOST_ENDED, Operation, Operations
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import holder
from tests.server.registry.registry_driver import A, B, size


class Desk:
    """Operations whose answers are given by hand."""

    def __init__(self) -> None:
        self.told: list[Happening] = []
        self.operations = Operations(self.told.extend, clock=lambda: 100.0)

    def begin(self, wish: AdminLoad | AdminUnload) -> Operation:
        return self.operations.begin(wish, asyncio.get_running_loop().create_future())


async def test_a_wish_is_the_same_whoever_has_it_but_not_with_other_options() -> None:
    desk = Desk()
    load, drain = desk.begin(AdminLoad(1, A, size())), desk.begin(AdminUnload(2, A))
    assert desk.operations.running(AdminLoad(7, A, size())) is load
    assert desk.operations.running(AdminUnload(8, A)) is drain
    for other in (
        AdminLoad(9, B, size()),
        AdminUnload(9, A, UnloadMode.ABORT),
        AdminUnload(9, A, deadline_s=1.0),
    ):
        assert desk.operations.running(other) is None
    assert desk.operations.of_waiter(2) is drain and desk.operations.of_waiter(7) is None
    load.answer.set_result(None)
    assert desk.operations.running(AdminLoad(7, A, size())) is None, "it has ended"
    await load
    assert desk.operations.running(AdminUnload(8, A)) is drain


async def test_states_and_errors_are_seen_and_told() -> None:
    desk = Desk()
    operation = desk.begin(AdminUnload(1, A, UnloadMode.DRAIN, 5.0))
    assert operation_view(operation) == {
        "id": operation.id, "what": "unload", "model": "A", "variant": "A",
        "options": {"mode": "drain", "deadline_s": 5.0}, "state": "running",
        "began_at": 100.0, "ended_at": None, "error": None,
    }  # fmt: skip
    operation.answer.set_exception(ModelBusyError("A is busy. Wait."))
    await asyncio.sleep(0)
    with pytest.raises(ModelBusyError):
        await operation
    with pytest.raises(ModelBusyError):
        operation.result()
    seen = operation_view(desk.operations.get(operation.id))
    assert (seen["state"], seen["ended_at"]) == ("failed", 100.0)
    assert seen["error"] == {"code": "model_busy", "message": "A is busy. Wait."}
    assert [(h.facts["state"], h.facts["error"]) for h in desk.told] == [
        ("running", None),
        ("failed", seen["error"]),
    ]


async def test_unexpected_errors_tell_nothing_of_the_server() -> None:
    desk = Desk()
    operation = desk.begin(AdminLoad(1, A, size()))
    operation.answer.set_exception(RuntimeError("/secret/path"))
    await asyncio.sleep(0)
    assert "secret" not in str(operation_view(operation)) and "secret" not in str(desk.told)


async def test_one_who_stops_waiting_ends_nothing_for_the_others() -> None:
    desk = Desk()
    operation = desk.begin(AdminLoad(1, A, size()))

    async def wait() -> str:
        await operation
        return "done"

    first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    operation.answer.set_result(None)
    assert await second == "done" and first.cancelled()


async def test_old_ones_are_forgotten_but_none_that_goes_on() -> None:
    desk = Desk()
    lasting = desk.begin(AdminLoad(0, B, size()))
    ended = []
    for waiter in range(1, MOST_ENDED + 4):
        ended.append(desk.begin(AdminLoad(waiter, A, size())))
        ended[-1].answer.set_result(None)
        await asyncio.sleep(0)
    known = list(desk.operations)
    assert known[0] is ended[-1] and known[-1] is lasting and len(known) == MOST_ENDED + 1
    with pytest.raises(OperationNotFoundError, match="GET /admin/operations"):
        desk.operations.get(ended[2].id)
    assert desk.operations.get(ended[3].id) is ended[3]


async def test_the_registry_does_the_same_thing_once() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        first, second = await registry.load("A"), await registry.load("A")
        assert first is second and first.state == "running"
        await reaches(registry, "A", State.LOADING)
        host.engine("A").may_load.set()
        await first
        again = await registry.load("A")
        assert again is not first and again.state == "done" and len(host.engines["A"]) == 1


async def test_another_way_to_unload_is_another_operation() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        drain = await registry.unload("A")
        assert await registry.unload("A") is drain
        abort = await registry.unload("A", UnloadMode.ABORT)
        assert abort is not drain
        await abort
        await drain
        with pytest.raises(ModelUnloadingError):
            await using


async def test_a_load_that_is_called_off_ends_its_worker_and_everybodys_wait() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        operation = await registry.load("A")
        await reaches(registry, "A", State.LOADING)
        await registry.cancel(operation)
        assert operation.state == "cancelled" and operation.ended_s is not None
        with pytest.raises(OperationCancelledError):
            await operation
        await reaches(registry, "A", State.UNLOADED)
        assert host.engine("A").closed and not registry.state.ledger.used[HOST]
        with pytest.raises(WrongStateError, match="has ended already: it is cancelled"):
            await registry.cancel(operation)


async def test_what_cannot_be_called_off_goes_on() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await (await registry.load("A"))
        host.engine("A").may_close.clear()
        operation = await registry.unload("A")
        with pytest.raises(WrongStateError, match="is being ended already"):
            await registry.cancel(operation)
        assert operation.state == "running"
        host.engine("A").may_close.set()
        await operation


async def test_what_goes_on_when_the_server_ends_has_failed() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        operation = await registry.load("A")
        await registry.close()
        assert operation.state == "failed"
