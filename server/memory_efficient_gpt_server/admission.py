"""Who may start: every request reserves its place before any work is done for it.

Purpose: bound the sequences and tokens under way, per key and in total, and say when to try again.
Does not know: HTTP, models, what a token is.
Invariant: what is admitted never exceeds a limit, and each reservation is given back exactly once.

A reservation is made in one uninterrupted piece of code on the event loop, so there is no time between check
and count. Its tokens are an estimate (from bytes) until `correct` replaces it by the tokenized size.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.errors import MOST_RETRY_AFTER_S, QuotaExceededError, ServerFullError

_RATE_HALF_LIFE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Most sequences and tokens (prompt + output, summed over sequences) under way at once.

    max_sequences_per_key: None for no limit. Clients without a key are one client.
    """

    max_sequences: int
    max_reserved_tokens: int
    max_sequences_per_key: int | None = None


class TokenRate:
    """Tokens given back per second, recent ones counting more: how fast the backlog shrinks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s = clock()
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int) -> None:
        """`tokens` have just been finished."""
        self._age()
        self._tokens += tokens

    def per_second(self) -> float | None:
        """The present rate; None before anything was measured."""
        self._age()
        return self._tokens / self._seconds if self._tokens and self._seconds else None

    def _age(self) -> None:
        now_s = self._clock()
        passed_s = now_s - self._since_s
        self._since_s = now_s
        keep = 0.5 ** (passed_s / _RATE_HALF_LIFE_S)
        self._tokens *= keep
        self._seconds = self._seconds * keep + passed_s


class Reservation:
    """A place for `sequences` sequences and `tokens` tokens. A context manager: leaving it releases."""

    __slots__ = ("_admission", "_released", "client", "sequences", "tokens")

    def __init__(self, admission: Admission, client: str, sequences: int, tokens: int) -> None:
        self._admission = admission
        self._released = False
        self.client = client
        self.sequences = sequences
        self.tokens = tokens

    def correct(self, tokens: int) -> None:
        """Replace the estimate by the real size. Raises ServerFullError if that does not fit."""
        self._admission._correct(self, tokens)

    def release(self, finished_tokens: int = 0) -> None:
        """Give the place back; `finished_tokens` of its tokens were computed. Further calls do nothing."""
        if not self._released:
            self._released = True
            self._admission._release(self, finished_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """All reservations of this server. Used from one event loop."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.sequences = 0
        self.tokens = 0
        self._by_client: Counter[str] = Counter()
        self._rate = TokenRate(clock)

    def reserve(self, client: str, sequences: int, tokens: int) -> Reservation:
        """A place, or QuotaExceededError (the key has too much under way) or ServerFullError.

        Raises InvalidRequestError for what would not fit an idle server either.
        """
        per_key, mine = self.limits.max_sequences_per_key, self._by_client.get(client, 0)
        most = min(self.limits.max_sequences, per_key or self.limits.max_sequences)
        if sequences > most:
            raise InvalidRequestError(
                f"The request asks for {sequences} sequences (n for each prompt); the limit is {most}.",
                param="n",
            )
        if per_key is not None and mine + sequences > per_key:
            raise QuotaExceededError(
                f"This key has {mine} sequences under way and asks for {sequences} more; "
                f"the limit is {per_key}. Wait for some to finish.",
                retry_after_s=self.retry_after_s(),
            )
        if self.sequences + sequences > self.limits.max_sequences:
            raise ServerFullError(
                f"The server has {self.sequences} sequences under way and can't take {sequences} more; "
                f"the limit is {self.limits.max_sequences}. Try again later.",
                retry_after_s=self.retry_after_s(),
            )
        self._require_tokens(tokens, 0)
        self.sequences += sequences
        self.tokens += tokens
        self._by_client[client] += sequences
        return Reservation(self, client, sequences, tokens)

    def retry_after_s(self) -> float:
        """Seconds until about half of what is under way is done, at the measured rate."""
        rate = self._rate.per_second()
        return 1.0 if rate is None else min(self.tokens / 2 / rate, float(MOST_RETRY_AFTER_S))

    def _correct(self, reservation: Reservation, tokens: int) -> None:
        self._require_tokens(tokens, reservation.tokens)
        self.tokens += tokens - reservation.tokens
        reservation.tokens = tokens

    def _release(self, reservation: Reservation, finished_tokens: int) -> None:
        self.sequences -= reservation.sequences
        self.tokens -= reservation.tokens
        self._by_client[reservation.client] -= reservation.sequences
        if not self._by_client[reservation.client]:
            del self._by_client[reservation.client]
        if finished_tokens:
            self._rate.add(finished_tokens)

    def _require_tokens(self, tokens: int, mine: int) -> None:
        """A request larger than the limit may run alone, or it could never run."""
        others = self.tokens - mine
        if others and others + tokens > self.limits.max_reserved_tokens:
            raise ServerFullError(
                f"The server has {others} tokens under way and can't take {tokens} more; "
                f"the limit is {self.limits.max_reserved_tokens}. Try again later.",
                retry_after_s=self.retry_after_s(),
            )
