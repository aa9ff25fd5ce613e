"""One optimisation step at a fixed window shape, replayed as a CUDA graph where there is a GPU.

Purpose: gather windows, forward, backward and update without host work between the kernels.
Doesn't know: schedules, evaluation, files. Letters: B rows, T tokens, C teacher's choices.
Invariant: building a step leaves weights and optimizer as they were.
"""

import logging

import torch
from torch import nn

from training.distill import TeacherChoices, mixed_loss
from training.optim import Optimizer
from training.settings import Phase

logger = logging.getLogger(__name__)
WARMUP_RUNS = 3


class Step:
    """Trains on the windows that start at given offsets; sums losses on the device until asked."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        stream: torch.Tensor,
        phase: Phase,
        teacher: tuple[TeacherChoices, float] | None,
        *,
        compiled: bool = True,
    ) -> None:
        self._model, self._optimizer, self._stream, self._teacher = model, optimizer, stream, teacher
        self._starts = torch.zeros(phase.rows, dtype=torch.long, device=stream.device)
        self._offsets = torch.arange(phase.length + 1, device=stream.device)
        self._loss_sum = torch.zeros((), device=stream.device)
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        on_gpu = stream.device.type == "cuda"
        self._loss = torch.compile(self._loss_of, dynamic=False) if on_gpu and compiled else self._loss_of
        if on_gpu:
            self._capture()

    def _loss_of(
        self, batch: torch.Tensor, choices: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Loss of token windows [B, T + 1]."""
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            logits = self._model(batch[:, :-1])
        weight = self._teacher[1] if self._teacher else 0.0
        return mixed_loss(logits, batch[:, 1:], choices, weight)

    def _body(self) -> None:
        places = self._starts[:, None] + self._offsets
        choices = None
        if self._teacher:
            inputs = places[:, :-1]
            choices = self._teacher[0].ids[inputs].long(), self._teacher[0].probabilities[inputs]
        loss = self._loss(self._stream[places].long(), choices)
        loss.backward()
        self._optimizer.step()
        self._loss_sum.add_(loss.detach())

    def _capture(self) -> None:
        """Compile and record with a rate of 0; if recording fails, steps are launched one by one."""
        self._optimizer.rate.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                self._model.zero_grad(set_to_none=True)
                self._body()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._body()
            self._graph = graph
        except RuntimeError as error:
            logger.warning("no CUDA graph, launching kernels one by one: %s", error)
        torch.cuda.synchronize()
        if self._graph is None:
            self._model.zero_grad(set_to_none=True)
        self._optimizer.reset()
        self._loss_sum.zero_()

    def run(self, starts: torch.Tensor, rate: float) -> None:
        """One step on the windows at `starts` (int64 [B]) with learning rates scaled by `rate`."""
        self._starts.copy_(starts)
        self._optimizer.rate.fill_(rate)
        if self._graph:
            self._graph.replay()
        else:
            self._model.zero_grad(set_to_none=True)
            self._body()
        self._runs += 1

    def take_loss(self) -> float:
        """Mean loss since the last call; waits for the device."""
        mean = float(self._loss_sum) / max(1, self._runs)
        self._loss_sum.zero_()
        self._runs = 0
        return mean
