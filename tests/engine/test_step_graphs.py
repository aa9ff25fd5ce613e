"""What is remembered of steps that were computed call by call; captures themselves need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_efficient_gpt.padded_steps import StepKind
from memory_efficient_gpt.step_graphs import StepGraphs
from memory_efficient_gpt.step_shape import StepShape

KIND = StepKind(StepShape(tokens=1, rows=1, context=512, decode=True), None)


class Steps:
    """Fails at first, as for want of memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def compute(self, kind: StepKind) -> None:
        """Counts."""
        self.calls += 1
        if self.calls == 1:
            raise MemoryError


def test_a_shape_for_which_memory_was_short_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A graph that finds no memory."""

        def capture_begin(self, **options: object) -> None:
            tries.append(options)
            if "pool" in options:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def capture_end(self) -> None:
            """Nothing was captured."""

    tries: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Full)
    monkeypatch.setattr(StepGraphs, "_on_stream", lambda graphs, work: work())
    steps: Any = Steps()
    steps.calls = 1
    graphs = StepGraphs(steps)
    for _ in range(202):
        graphs._launch(KIND)
    assert graphs.obstacle is None and steps.calls == 203  # each was computed all the same
    assert len([options for options in tries if "pool" in options]) == 1
    graphs._launch(KIND)
    assert len([options for options in tries if "pool" in options]) == 2


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[StepKind]:
    """The kinds that were to be captured, without a GPU."""
    kinds: list[StepKind] = []

    def here(graphs: StepGraphs, work: Callable[[], None]) -> None:
        work()

    def capture(graphs: StepGraphs, kind: StepKind) -> None:
        kinds.append(kind)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(StepGraphs, "_on_stream", here)
    monkeypatch.setattr(StepGraphs, "_capture", capture)
    return kinds


def test_a_shape_whose_first_step_failed_is_not_captured_before_one_succeeded(
    captured: list[StepKind],
) -> None:
    steps: Any = Steps()
    graphs = StepGraphs(steps)
    with pytest.raises(MemoryError):
        graphs._launch(KIND)
    graphs._launch(KIND)
    assert captured == []
    graphs._launch(KIND)
    assert captured == [KIND] and steps.calls == 3
