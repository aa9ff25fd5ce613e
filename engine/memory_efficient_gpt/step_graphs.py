"""Steps as CUDA graphs: model, head and simple sampling captured once for a shape, replayed with one launch.

Purpose: compute a step whose host time would exceed its device time.
Does not know: requests, plans, architectures.
Invariant: a replay computes what the captured calls would, on new inputs; nothing waits for the device but
`check`; one stream at a time. What can't be captured is computed call by call, and the log says why.

A shape is computed call by call the first time (kernels compile, libraries allocate), captured the second.
All graphs share one memory pool: their outputs are copied out of it before another one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from memory_efficient_gpt.padded_steps import PaddedSteps, StepKind
from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling.batch import HostParameters
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import Choice, RowsToSample, shape_of

logger = logging.getLogger(__name__)

_MOST_GRAPHS: Final = 256
_PUT_OFF: Final = 200
"""Steps of a shape before it is tried again where memory was short."""


class StepGraphs:
    """The graphs of one model on one CUDA device.

    obstacle: why nothing is captured, or None. captured, replayed: graphs so far, and steps by them.
    """

    chooses = True

    def __init__(self, steps: PaddedSteps) -> None:
        self.obstacle: str | None = None
        self.captured = self.replayed = 0
        self._steps = steps
        self._stream = torch.cuda.Stream(steps.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepKind, torch.cuda.CUDAGraph | None] = {}
        self._put_off: dict[StepKind, int] = {}

    def run(self, layout: StepLayout, samples: RowsToSample, choice: Choice | None) -> torch.Tensor | None:
        """Launch a step; returns `PaddedSteps.result`, or None if the step is not one for a graph."""
        shape = shape_of(layout) if self.obstacle is None else None
        if shape is None:
            return None
        kind = StepKind(shape, choice)
        if kind not in self._graphs and len(self._graphs) >= _MOST_GRAPHS:
            return None
        self._steps.load(layout, samples, shape)
        self._launch(kind)
        return self._steps.result(kind, len(samples.logit_rows))

    def check(self, vocabulary: int, no_slot: int) -> str | None:
        """Compute one token call by call and by a graph; why graphs are not used then, or None.

        no_slot: an element of last_tokens that belongs to no slot. Writes to the trash block only. Tokens are
        chosen once, too, so that no request waits for that kernel to be compiled.
        """
        one = np.zeros(1, dtype=np.int32)
        layout = StepLayout(
            np.full(1, vocabulary - 1), one - 1, np.zeros(1, np.int64), np.zeros(1, np.int64),
            np.array([0, 1], np.int32), one + 1, np.zeros((1, 1), np.int32),
        )  # fmt: skip
        samples = RowsToSample(one, one + no_slot)
        first = self.run(layout, samples, None)
        own = first.clone() if first is not None else None
        replayed = self.run(layout, samples, None)
        if (
            self.obstacle is None
            and own is not None
            and replayed is not None
            and not torch.equal(own, replayed)
        ):
            self._give_up("a captured step gave other logits than its calls")
        if self.obstacle is None:
            draws = RowsToSample(one, one + no_slot, HostParameters([SamplingParams()]), np.zeros(1))
            self.run(layout, samples, Choice.GREEDY)
            self.run(layout, draws, Choice.DRAW)
        return self.obstacle

    def forget(self) -> None:
        """Drop all graphs and the memory that they share."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        self._steps.drop_logits()

    def _launch(self, kind: StepKind) -> None:
        if kind not in self._graphs:
            self._on_stream(lambda: self._steps.compute(kind))
            self._graphs[kind] = None  # not if it failed: nothing is prepared for a capture then
            return
        graph = self._graphs[kind] or self._capture_in_time(kind)
        if graph is None:
            self._on_stream(lambda: self._steps.compute(kind))
        else:
            graph.replay()
            self.replayed += 1

    def _capture_in_time(self, kind: StepKind) -> torch.cuda.CUDAGraph | None:
        """A graph, but not soon after memory was short for it."""
        left = self._put_off.get(kind, 0)
        self._put_off[kind] = left - 1
        return self._capture(kind) if left <= 0 else None

    def _capture(self, kind: StepKind) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()

        def record() -> None:
            # torch.cuda.graph() would collect garbage and empty the allocator's cache before each capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._steps.compute(kind)
            finally:
                graph.capture_end()

        try:
            self._on_stream(record)
        except torch.OutOfMemoryError:
            self._put_off[kind] = _PUT_OFF
            logger.warning("No memory to capture %s; tried again after %d such steps.", kind.shape, _PUT_OFF)
            self._on_stream(self._capture_nothing)
            return None
        except RuntimeError as error:
            self._give_up(f"the model can't be captured ({str(error).splitlines()[0][:200]})")
            self._on_stream(self._capture_nothing)
            return None
        self._graphs[kind] = graph
        self.captured += 1
        return graph

    def _capture_nothing(self) -> None:
        """After a capture that failed torch's random generator believes that one goes on; this ends it."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=self._steps.device)
        graph.capture_end()

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        self._graphs.clear()
        logger.warning("No CUDA graphs: %s.", reason)

    def _on_stream(self, work: Callable[[], None]) -> None:
        """Run `work` on the stream of captures, between what the current stream has and will have."""
        current = torch.cuda.current_stream(self._steps.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
