"""When to restart a worker, and when to call it stuck: rules over times, nothing else.

Purpose: the supervisor's decisions as pure state, so that tests need no process and no clock.
Does not know: processes, sockets; every `now_s` is a monotonic time in seconds given by the caller.
Invariant: a worker that keeps dying is given up; a worker that computes slowly is not called stuck.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 60.0
MAX_DEATHS: Final = 5
DEATHS_WINDOW_S: Final = 600.0
STEADY_AFTER_S: Final = 60.0

RESUME_WAIT_S: Final = 120.0
"""Room for the load of a large model, or for a small one's third restart."""

LEAST_STALL_S: Final = 10.0
STALL_STEPS: Final = 20.0
KILL_AFTER_STALLS: Final = 2.5
LEAST_LOAD: Final = 0.05
"""Share of a core above which a process counts as computing."""
LONGEST_STEP_S: Final = 600.0
"""A step that computes longer than this is not slow but endless."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What an operator may choose of the rules below. Times in seconds.

    resume_wait_s: how long a dead worker's requests wait for the next one. stall_s, stall_steps: a worker
    that makes no step for the longer of stall_s and stall_steps x the 99th percentile of its steps is stuck.
    kill_factor: after so many times that, a stuck one that does not compute is killed. max_step_s: after so
    long any stuck one is.
    """

    resume_wait_s: float = RESUME_WAIT_S
    stall_s: float = LEAST_STALL_S
    stall_steps: float = STALL_STEPS
    kill_factor: float = KILL_AFTER_STALLS
    max_step_s: float = LONGEST_STEP_S

    def stall_rule(self, now_s: float) -> StallRule:
        """A rule with these limits, its clock started."""
        return StallRule(
            now_s,
            least_s=self.stall_s,
            steps=self.stall_steps,
            kill_after=self.kill_factor,
            longest_step_s=self.max_step_s,
        )


class RestartRule:
    """Delays of 1, 2, 4 .. 60 s between restarts; the fifth death within ten minutes is the last.

    A worker that was ready for a minute before it died starts again with the shortest delay.
    """

    def __init__(self) -> None:
        self._deaths_s: deque[float] = deque()
        self._delay_s = FIRST_DELAY_S

    def died(self, now_s: float, *, ready_for_s: float) -> float | None:
        """Seconds to wait before the restart, or None to give up."""
        self._deaths_s.append(now_s)
        while self._deaths_s[0] < now_s - DEATHS_WINDOW_S:
            self._deaths_s.popleft()
        if len(self._deaths_s) >= MAX_DEATHS:
            return None
        if ready_for_s >= STEADY_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        return delay_s


class StallRule:
    """A worker is stuck if it has work and its step counter has not moved for max(10 s, 20 x p99 step).

    Being stuck makes it unready. It is beyond hope only if it does not compute either: a first step may
    be a long prompt through a large model on a slow machine, and killing that would only start it again.
    Limits: least_s and steps for being stuck, kill_after (a multiple of that limit) and longest_step_s for
    being killed.
    """

    def __init__(
        self,
        now_s: float,
        *,
        least_s: float = LEAST_STALL_S,
        steps: float = STALL_STEPS,
        kill_after: float = KILL_AFTER_STALLS,
        longest_step_s: float = LONGEST_STEP_S,
    ) -> None:
        self._moved_s = self._computed_s = self._observed_s = now_s
        self._steps = -1
        self._cpu_s = 0.0
        self._least_s, self._stall_steps = least_s, steps
        self._kill_after, self._longest_step_s = kill_after, longest_step_s
        self.limit_s = least_s

    def moved(self, now_s: float) -> None:
        """It has told news of a step, or was idle until now: the clock starts anew."""
        self._moved_s = now_s

    def counted(self, steps: int, step_p99_s: float, now_s: float) -> None:
        """It has told its step counter and how long steps take."""
        if steps > self._steps:
            self._steps, self._moved_s = steps, now_s
        self.limit_s = max(self._least_s, self._stall_steps * step_p99_s)

    def stalled(self, now_s: float) -> bool:
        """Whether a worker that has work is stuck."""
        return now_s - self._moved_s > self.limit_s

    def observed(self, cpu_s: float, now_s: float) -> None:
        """It has used this much processor time in all."""
        if cpu_s - self._cpu_s > LEAST_LOAD * (now_s - self._observed_s):
            self._computed_s = now_s
        self._cpu_s, self._observed_s = cpu_s, now_s

    def beyond_hope(self, now_s: float) -> bool:
        """Whether it has been stuck for so long, and idle, that it should be killed."""
        idle_s = now_s - max(self._moved_s, self._computed_s)
        return idle_s > self._kill_after * self.limit_s or now_s - self._moved_s > self._longest_step_s


USUAL_LIMITS: Final = WorkerLimits()
