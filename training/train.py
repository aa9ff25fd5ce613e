"""Trains one model from prepared token streams.

Purpose: the training loop, its schedule, the validation figures along the way, and a command line
    that writes a finished model folder.
Doesn't know: other runs (see `training.plan`), the test split.
Invariant: the schedule always ends with a learning rate of zero, whether it is measured in steps or seconds.
"""

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.architectures import make_model, num_parameters
from training.data import END_OF_TEXT_ID, Streams, WindowSampler, load_streams
from training.distill import TeacherChoices
from training.export import export_folder
from training.optim import Optimizer, schedule
from training.scoring import Score, score_books, split_stream
from training.settings import RecipeSettings, RunSettings, read_run
from training.step import Step

logger = logging.getLogger(__name__)
LOG_EVERY = 20  # steps; each log waits for the device
CARD = "# {name}\n\nTrained by `training.train`; see docs/bundled_models.md.\n"


@dataclass(frozen=True)
class Point:
    """One row of the training curve; bits per byte are None where validation was not run."""

    step: int
    tokens: int
    seconds: float
    train_nats: float
    valid_bits_per_byte: float | None = None


@dataclass(frozen=True)
class Trained:
    """A trained model with its curve and its final validation score."""

    model: nn.Module
    curve: list[Point]
    valid: Score
    seconds: float

    def summary(self, run: RunSettings) -> dict[str, Any]:
        """What goes into a results file."""
        return {
            "name": run.name,
            "settings": asdict(run),
            "parameters": num_parameters(self.model),
            "steps": self.curve[-1].step,
            "tokens": self.curve[-1].tokens,
            "seconds": round(self.seconds, 1),
            "valid_bits_per_byte": round(self.valid.bits_per_byte, 4),
            "valid_perplexity": round(self.valid.perplexity, 3),
            "valid_accuracy": round(self.valid.accuracy, 4),
            "curve": [asdict(point) for point in self.curve],
        }


def validate(model: nn.Module, streams: Streams, window: int, stride: int) -> Score:
    """Score on the validation books with bf16 arithmetic."""
    books = split_stream(streams.valid, END_OF_TEXT_ID)
    model.eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            return model(ids)  # type: ignore[no-any-return]

    score = score_books(logits_of, books, streams.valid_bytes, window, stride)
    model.train()
    return score


class _Clock:
    """Progress of a schedule from 0 to 1, by steps or by wall-clock seconds.

    `until` is the time.monotonic() at which a schedule of seconds ends, instead of after `recipe.seconds`.
    """

    def __init__(self, recipe: RecipeSettings, until: float | None = None) -> None:
        self._recipe, self._start, self.step = recipe, time.monotonic(), 0
        self._seconds = recipe.seconds or 1.0
        if until is not None and recipe.seconds is not None:
            self._seconds = until - self._start
            if self._seconds <= 0:
                raise ValueError(f"training had to end {-self._seconds:.0f} s before it could begin")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        if self._recipe.steps is not None:
            return self.step / self._recipe.steps
        return self.seconds / self._seconds


def train(
    run: RunSettings,
    streams: Streams,
    teacher: TeacherChoices | None = None,
    *,
    until: float | None = None,
    compiled: bool = True,
) -> Trained:
    """Train a new model; runs on the device of the streams.

    until: when (by time.monotonic()) a schedule of seconds ends, so that compiling counts too; None gives
    the schedule all of its seconds. compiled: False spares a GPU the compilation, for slower steps.
    Raises: ValueError if `until` is over before the first step.
    """
    recipe, device = run.recipe, streams.train.device
    torch.set_float32_matmul_precision("high")
    model = make_model(run.model, recipe.seed).to(device).train()
    optimizer = Optimizer(model, recipe)
    stream = torch.cat([streams.train, streams.chat])
    mixed = (teacher, recipe.teacher_weight) if teacher is not None else None
    steps = [Step(model, optimizer, stream, phase, mixed, compiled=compiled) for phase in recipe.phases]
    samplers = [
        WindowSampler(streams, phase.rows, round(phase.rows * recipe.chat_share), phase.length, recipe.seed)
        for phase in recipe.phases
    ]
    curve, tokens, index, next_eval = list[Point](), 0, 0, recipe.eval_every
    clock = _Clock(recipe, until)
    bar = tqdm(total=100, desc=run.name, unit="%", mininterval=5)
    while (progress := clock.progress) < 1:
        while index + 1 < len(steps) and progress >= recipe.phases[index].until:
            index += 1
        steps[index].run(samplers[index].next_batch(), schedule(progress, recipe))
        clock.step += 1
        tokens += recipe.phases[index].length * recipe.phases[index].rows
        if clock.step % LOG_EVERY:
            continue
        loss, bits = steps[index].take_loss(), None
        if progress >= next_eval:
            next_eval += recipe.eval_every
            window = recipe.phases[index].length
            bits = validate(model, streams, window, window).bits_per_byte
        if bits is not None or clock.step % (10 * LOG_EVERY) == 0:
            curve.append(Point(clock.step, tokens, round(clock.seconds, 1), loss, bits))
        bar.update(int(100 * min(1, progress)) - bar.n)
        bar.set_postfix(loss=f"{loss:.3f}", bpb=f"{bits:.4f}" if bits else "", refresh=False)
    bar.close()
    seconds, window = clock.seconds, max(phase.length for phase in recipe.phases)
    valid = validate(model, streams, window, window // 2)
    curve.append(Point(clock.step, tokens, round(seconds, 1), steps[index].take_loss(), valid.bits_per_byte))
    return Trained(model, curve, valid, seconds)


def main() -> None:
    """Command line: train one model and write its folder."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by training.data")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--config", type=Path, required=True, help="run settings, e.g. training/configs/tiny.yaml"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, training.json inside")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    run = read_run(args.config)
    result = train(run, load_streams(args.data, torch.device(args.device)))
    export_folder(run.model, result.model.state_dict(), args.tokenizer, CARD.format(name=run.name), args.out)
    summary = result.summary(run)
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    logger.info("valid: %.4f bits per byte", summary["valid_bits_per_byte"])


if __name__ == "__main__":
    main()
