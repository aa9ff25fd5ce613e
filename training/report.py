"""Puts the figures of a finished plan together: one JSON record and the model cards.

Purpose: merge training results, sweep results and evaluations, so that every number in the
    documentation and in the cards comes from one file.
Doesn't know: how to train or to score.
Invariant: a card states only figures that stand in the record.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

KINDS = {
    "demo": "Llama architecture with grouped-query attention ({heads} query, {kv_heads} key/value heads)",
    "demo-mha": "GPT-2 architecture: plain multi-head attention ({heads} heads) and learned positions",
    "demo-draft": "Llama architecture, a small draft model for speculative decoding with `demo`",
}
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small language model of English prose, bundled so that everything works offline and at once.
{kind}.
{parameters:,} parameters, {layers} layers of width {hidden_size}, {max_positions:,} positions, byte-level BPE
with 4,096 tokens, bf16.

**Use it** to try and to test an inference server. **Don't** use it for facts or advice: it knows only how
novels sound, and it invents everything. It can echo the prejudices of its period.

**Data.** 135 English novels and story collections (70 MB) from Standard Ebooks (standardebooks.org): texts
in the US public domain; Standard Ebooks dedicates its own work to the public domain (CC0). Nothing else.

**Chat.** The chat template (`<|user|>...<|end|><|assistant|>`) was trained on dialogue out of the same books,
a system message being the narration before it. Answers are lines of a novel's dialogue, and they end.

**Held-out figures** (four whole books that no choice was made on; bf16 weights): {bits_per_byte:.3f} bits per
byte, perplexity {perplexity_per_token:.1f} per token, next-token accuracy {accuracy:.1f}% (windows of
{window:,} tokens, stride {stride:,}).

Trained by distillation: {teacher}. Recipe, figures and samples
are in the project's `docs/bundled_models.md`, the scripts in `training/`.
"""


TEACHERS = {
    "teacher": "its teacher is a model of 26 million parameters on the same books",
    "demo": "its teacher is `demo`",
}


def render_card(run: dict[str, Any], test: dict[str, Any]) -> str:
    """README.md of one bundled model."""
    model = run["settings"]["model"]
    values = {**model, **test, "name": run["name"], "parameters": run["parameters"]}
    values["accuracy"] = 100 * test["next_token_accuracy"]
    values["teacher"] = TEACHERS[run["settings"]["teacher"]]
    values["kind"] = KINDS[run["name"]].format(**model)
    return CARD.format(**values)


def merge_evaluations(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """split -> models, compressors and draft agreement, from any number of evaluation files."""
    merged: dict[str, dict[str, Any]] = {}
    for path in paths:
        report = json.loads(path.read_text())
        split = merged.setdefault(report.pop("split"), {"models": {}})
        split["models"].update(report.pop("models"))
        split.update(report)
    return merged


def without_curve(run: dict[str, Any]) -> dict[str, Any]:
    """A run's summary with only the validated points of its curve."""
    return {**run, "curve": [point for point in run["curve"] if point["valid_bits_per_byte"]]}


def main() -> None:
    """Command line: write the record and the cards."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results.json of the bundled plan")
    parser.add_argument("--sweep", type=Path, required=True, help="results.json of the sweep plan")
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="from training.evaluate")
    parser.add_argument("--machine", required=True, help="what trained: GPU and versions, in words")
    parser.add_argument("--evaluated-on", required=True, help="what evaluated, in the same way")
    parser.add_argument("--bundled", type=Path, required=True, help="folder of model folders, for the cards")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    args = parser.parse_args()
    runs = [without_curve(run) for run in json.loads(args.results.read_text())]
    splits = merge_evaluations(args.evaluations)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": args.machine,
        "evaluated_on": args.evaluated_on,
        "held_out": splits,
        "runs": runs,
        "sweep": [without_curve(run) for run in json.loads(args.sweep.read_text())],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for run in runs:
        if run["settings"]["bundled"]:
            text = render_card(run, splits["test"]["models"][run["name"]])
            (args.bundled / run["name"] / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
