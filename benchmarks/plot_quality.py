"""Draws quality over bits per weight from the records of `benchmarks.quality` (needs matplotlib and Pillow).

Purpose: one panel for each record: loss of perplexity against stored bits, mixed plans as a line.
Does not know: how the numbers came about.
Invariant: every row of a record is drawn, or named in the title when it lies outside the panel.

    python -m benchmarks.plot_quality RECORD.json [RECORD.json ...] --out docs/images/quantization_quality.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FAMILIES = {
    "mixed": "ours, mixed precision", "bitsandbytes": "bitsandbytes", "gptq": "ours, one scheme, by gptq",
    "": "ours, one scheme",
}  # fmt: skip
MOST_PERCENT = 12.0


def family(name: str) -> str:
    """To which of the legend's entries a row belongs."""
    return next(word for word in FAMILIES if name.startswith(word) or name.endswith(f", {word}"))


def draw(record: dict[str, Any], axis: Any) -> None:
    """One record into one panel."""
    base = record["rows"][0]["perplexity"]
    outside: list[str] = []
    losses = [100 * (row["perplexity"] / base - 1) for row in record["rows"][1:]]
    top = min(MOST_PERCENT, 1.1 * max(losses))
    for prefix, label in FAMILIES.items():
        points = sorted(
            (row["bits"], 100 * (row["perplexity"] / base - 1), row["name"])
            for row in record["rows"][1:]
            if family(row["name"]) == prefix
        )
        outside += [name for _, worse, name in points if worse > top]
        points = [point for point in points if point[1] <= top]
        if not points:
            continue
        bits, worse, names = zip(*points, strict=True)
        axis.plot(bits, worse, "o-" if prefix == "mixed" else "o", label=label, markersize=4)
        if prefix != "mixed":
            for x, y, name in zip(bits, worse, names, strict=True):
                label = name.removeprefix("bitsandbytes ").removesuffix(", gptq")
                axis.annotate(label, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    title = f"{record['model']}, {record['split']} books"
    axis.set(xlabel="stored bits a weight", ylabel="perplexity, % above bf16", ylim=(-0.05 * top, top))
    axis.set_title(title + (f"\nabove the panel: {', '.join(outside)}" if outside else ""), fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def main() -> None:
    """Command line: records -> PNG."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    from PIL import Image  # type: ignore[import-not-found, unused-ignore]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_quality", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    count = len(options.records)
    figure, axes = plt.subplots(1, count, figsize=(6 * count, 4), squeeze=False, constrained_layout=True)
    for path, axis in zip(options.records, axes[0], strict=True):
        draw(json.loads(path.read_text()), axis)
    figure.savefig(options.out, dpi=100)
    with Image.open(options.out) as image:  # a third of the bytes: few colours are enough for lines
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
