"""Administrators' wishes on their way to the owner and back.

Purpose: one operation for each wish, and changes that the owner considers at once.
Does not know: what follows from a wish, who may have one.
Invariant: the same wish while it is being fulfilled is the same operation; a wish that comes back was
considered by the owner, or refused as the server ends.
"""

from __future__ import annotations

from collections.abc import Callable

from memory_efficient_gpt_server.errors import WrongStateError
from memory_efficient_gpt_server.registry.answers import Answers
from memory_efficient_gpt_server.registry.events import AdminCancel, Event, Removed
from memory_efficient_gpt_server.registry.inbox import Inbox
from memory_efficient_gpt_server.registry.operations import AdminWish, Operation, Operations


class Wishes:
    """Used from one event loop."""

    def __init__(self, answers: Answers, inbox: Inbox, operations: Operations) -> None:
        self._answers = answers
        self._inbox = inbox
        self._operations = operations

    async def begin(self, make: Callable[[int], AdminWish]) -> Operation:
        """Post the wish that `make` makes for an id, and wait until it was considered.

        If the same goes on, that is the answer. Raises DrainingError.
        """
        wish = make(self._answers.new_id())
        same = self._operations.running(wish)
        if same is not None:
            return same
        answer = self._answers.expect(wish.operation, str(wish.key), log_failure=True)
        begun = self._operations.begin(wish, answer)
        await self._inbox.considered(wish, answer)
        return begun

    async def consider(self, event: Event) -> None:
        """Have the owner take a step with an event that is not answered. Raises DrainingError."""
        waiter = self._answers.new_id()
        closed = self._answers.expect(waiter, "", log_failure=True)
        try:
            stepped = await self._inbox.considered(event, closed)
        finally:
            self._answers.forget(waiter)
        if closed.done():
            closed.result()
        if not stepped:
            raise RuntimeError(f"the registry failed on {type(event).__name__}")

    async def cancel(self, operation: Operation) -> None:
        """Call a wish off. Raises WrongStateError if it has ended or can't be stopped, DrainingError."""
        if operation.done():
            raise WrongStateError(f"Operation {operation.id} has ended already: it is {operation.state}.")
        wish = operation.wish
        waiter = self._answers.new_id()
        answer = self._answers.expect(waiter, str(wish.key))
        self._inbox.post(AdminCancel(waiter, wish.key, wish.operation))
        await answer

    async def dismiss(self, model_id: str) -> None:
        """Forget a model. Raises ModelNotFoundError, ModelBusyError, DrainingError."""
        waiter = self._answers.new_id()
        answer = self._answers.expect(waiter, model_id, log_failure=True)
        self._inbox.post(Removed(waiter, model_id))
        await answer
