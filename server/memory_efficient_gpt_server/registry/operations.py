"""What administrators have asked for, while it goes on and for a while after.

Purpose: an operation's state by its id, and one operation for a wish however often it is repeated.
Does not know: how a wish is fulfilled, HTTP.
Invariant: a running operation is never forgotten; of those that ended the last `MOST_ENDED` are kept.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.errors import OperationCancelledError, OperationNotFoundError
from memory_efficient_gpt_server.registry.events import AdminLoad, AdminSleep, AdminUnload, AdminWake
from memory_efficient_gpt_server.registry.happenings import Happening, HappeningKind, reason_text

MOST_ENDED: Final = 256

AdminWish: TypeAlias = AdminLoad | AdminUnload | AdminSleep | AdminWake

_NAMES: Final[dict[type, str]] = {
    AdminLoad: "load",
    AdminUnload: "unload",
    AdminSleep: "sleep",
    AdminWake: "wake",
}


@dataclass(slots=True, eq=False)
class Operation:
    """One wish under way or ended. Await it for its end: that raises what it was refused with.

    Times are Unix times in seconds. A waiter that is cancelled leaves the operation as it is.
    """

    id: str
    wish: AdminWish
    answer: asyncio.Future[None]
    began_s: float
    ended_s: float | None = None

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.shield(self.answer).__await__()

    @property
    def what(self) -> str:
        """load, unload, sleep or wake."""
        return _NAMES[type(self.wish)]

    @property
    def model_id(self) -> str:
        """Whose."""
        return self.wish.key.model_id

    @property
    def state(self) -> str:
        """running, done, failed or cancelled."""
        if not self.answer.done():
            return "running"
        if self.error is None:
            return "done"
        return "cancelled" if isinstance(self.error, OperationCancelledError) else "failed"

    @property
    def error(self) -> BaseException | None:
        """Why it has failed."""
        return self.answer.exception() if self.answer.done() else None

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.answer.done()

    def result(self) -> None:
        """Nothing, once it has ended well. Raises what it was refused with."""
        self.answer.result()


class Operations:
    """All of them by id. Used from one event loop. tell: takes what is worth telling."""

    def __init__(
        self, tell: Callable[[Iterable[Happening]], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._by_id: dict[str, Operation] = {}
        self._running: dict[AdminWish, Operation] = {}

    def __iter__(self) -> Iterator[Operation]:
        """From the newest to the oldest."""
        return reversed(self._by_id.values())

    def get(self, operation_id: str) -> Operation:
        """Raises OperationNotFoundError."""
        try:
            return self._by_id[operation_id]
        except KeyError:
            raise OperationNotFoundError(
                f"There is no operation {operation_id[:80]!r}: it never was, or it ended long ago. "
                "GET /admin/operations lists those that are known."
            ) from None

    def of_waiter(self, waiter: int) -> Operation | None:
        """The running operation that waits under this id of the registry's."""
        return next((o for o in self._running.values() if o.wish.operation == waiter), None)

    def running(self, wish: AdminWish) -> Operation | None:
        """The operation for the same wish (of the same model, with the same options) that goes on."""
        found = self._running.get(_anonymous(wish))
        return None if found is None or found.done() else found

    def begin(self, wish: AdminWish, answer: asyncio.Future[None]) -> Operation:
        """Note a wish that is about to be considered; it has ended once `answer` is there."""
        operation = Operation(f"op-{secrets.token_hex(8)}", wish, answer, self._clock())
        self._by_id[operation.id] = self._running[_anonymous(wish)] = operation
        self._tell([_happening(operation)])
        answer.add_done_callback(lambda _: self._end(operation))
        return operation

    def _end(self, operation: Operation) -> None:
        operation.ended_s = self._clock()
        wish = _anonymous(operation.wish)
        if self._running.get(wish) is operation:
            del self._running[wish]
        self._tell([_happening(operation)])
        ended = [o.id for o in self._by_id.values() if o.ended_s is not None]
        for old in ended[: max(0, len(ended) - MOST_ENDED)]:
            del self._by_id[old]


def error_view(error: BaseException | None) -> dict[str, Any] | None:
    """An error of an operation as a JSON object; None for none."""
    if error is None:
        return None
    if isinstance(error, MegptError):
        return {"code": error.code, "message": error.message}
    return {"code": MegptError.code, "message": "The server failed on it; its log has the details."}


def _anonymous(wish: AdminWish) -> AdminWish:
    """The wish, whoever has it."""
    return replace(wish, operation=0)


def _happening(operation: Operation) -> Happening:
    error = error_view(operation.error)
    if error is not None:
        error["message"] = reason_text(error["message"])
    facts = {
        "model": operation.model_id,
        "variant": str(operation.wish.key),
        "operation": operation.id,
        "what": operation.what,
        "state": operation.state,
        "error": error,
    }
    return Happening(HappeningKind.OPERATION, facts)
