"""Runs a plan: several trainings in one process, students after their teachers.

Purpose: a plan file lists runs; each names a config and the settings it changes. The bundled models are
    `configs/bundled.yaml`, the comparisons that chose their recipe `configs/sweep.yaml`.
Doesn't know: the training loop.
Invariant: a failed run is recorded and the next one starts; results are on disk after every run.
"""

import argparse
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from training.architectures import make_model
from training.data import Streams, load_streams
from training.distill import TeacherChoices, teacher_choices
from training.export import export_folder
from training.settings import RunSettings, parse_run
from training.train import CARD, train

logger = logging.getLogger(__name__)
COLUMNS = ("name", "parameters", "steps", "tokens", "seconds", "valid_bits_per_byte", "valid_perplexity")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_plan(path: Path) -> list[RunSettings]:
    """The runs of a plan file; `config` is relative to the plan's folder."""
    runs = []
    for entry in yaml.safe_load(path.read_text())["runs"]:
        config = yaml.safe_load((path.parent / entry.pop("config")).read_text())
        runs.append(parse_run(merge(config, entry)))
    return runs


class Plan:
    """Executes runs in order and keeps the choices of the latest teacher."""

    def __init__(
        self, runs: list[RunSettings], streams: Streams, tokenizer: Path, out: Path, scratch: Path
    ) -> None:
        self._runs, self._streams, self._tokenizer = runs, streams, tokenizer
        self._out, self._scratch = out, scratch
        self._choices: tuple[str, TeacherChoices] | None = None
        self.results: list[dict[str, Any]] = []

    def _teacher(self, name: str | None) -> TeacherChoices | None:
        """What the named earlier run says about the streams; None without a teacher."""
        if name is None:
            return None
        if self._choices is None or self._choices[0] != name:
            self._choices = None
            run = parse_run(json.loads((self._scratch / f"{name}.json").read_text()))
            stream = torch.cat([self._streams.train, self._streams.chat])
            teacher = make_model(run.model, 0).to(stream.device)
            teacher.load_state_dict(load_file(self._scratch / f"{name}.safetensors"))
            length = run.recipe.phases[-1].length
            rows = max(1, 2**16 // length)
            choices = teacher_choices(teacher, stream, length, rows, compiled=stream.device.type == "cuda")
            self._choices = (name, choices)
        return self._choices[1]

    def run_all(self, deadline_s: float) -> None:
        """Every run that can still finish within `deadline_s` seconds from now."""
        start = time.monotonic()
        for run in self._runs:
            left = deadline_s - (time.monotonic() - start)
            if (run.recipe.seconds or 0) > left:
                logger.warning("%s skipped: %.0f s left", run.name, left)
                continue
            try:
                self._run_one(run)
            except Exception:  # the boundary of one run: deliver the others
                logger.exception("%s failed", run.name)
            gc.collect()
            torch._dynamo.reset()
            logger.info("%.0f s since start", time.monotonic() - start)

    def _run_one(self, run: RunSettings) -> None:
        began = time.monotonic()
        result = train(run, self._streams, self._teacher(run.teacher))
        self.results.append({**result.summary(run), "wall_seconds": round(time.monotonic() - began, 1)})
        (self._out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in result.model.state_dict().items()
        }
        save_file(weights, self._scratch / f"{run.name}.safetensors")
        settings = self.results[-1]["settings"]
        (self._scratch / f"{run.name}.json").write_text(json.dumps(settings))
        if run.bundled:
            export_folder(
                run.model, weights, self._tokenizer, CARD.format(name=run.name), self._out / run.name
            )


def main() -> None:
    """Command line: run a plan, print a table."""
    parser = argparse.ArgumentParser(prog="python -m training.plan", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by training.data")
    parser.add_argument(
        "--plan", type=Path, required=True, help="plan file, e.g. training/configs/bundled.yaml"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and bundled models")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the weights (float32)")
    parser.add_argument("--deadline-s", type=float, default=1e9, help="start no run that would end later")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for folder in (args.out, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    streams = load_streams(args.data, torch.device(args.device))
    plan = Plan(read_plan(args.plan), streams, args.tokenizer, args.out, args.scratch)
    plan.run_all(args.deadline_s)
    for result in plan.results:
        cells = [f"{result[column]:>14}" for column in COLUMNS[1:]]
        print(f"{result['name']:24}" + "".join(cells))


if __name__ == "__main__":
    main()
