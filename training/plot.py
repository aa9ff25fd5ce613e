"""Draws the training curves of a results file as a PNG (needs matplotlib and Pillow).

Purpose: loss on the training windows and validation bits per byte against tokens seen.
Doesn't know: how the numbers came about.
Invariant: every run in the file is drawn.
"""

import argparse
import json
from pathlib import Path


def draw(results: Path, out: Path) -> None:
    """One panel for training loss, one for validation."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    from PIL import Image  # type: ignore[import-not-found, unused-ignore]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for run in json.loads(results.read_text()):
        points = run["curve"]
        left.plot([p["tokens"] / 1e6 for p in points], [p["train_nats"] for p in points], label=run["name"])
        scored = [p for p in points if p["valid_bits_per_byte"]]
        tokens, bits = [p["tokens"] / 1e6 for p in scored], [p["valid_bits_per_byte"] for p in scored]
        right.plot(tokens, bits, marker="o", markersize=3, label=run["name"])
    left.set(xlabel="million tokens", ylabel="training loss, nats per token", ylim=(2.4, 4.2))
    right.set(xlabel="million tokens", ylabel="validation, bits per byte")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=90)
    with Image.open(out) as image:  # a fourth of the bytes: few colours are enough for lines
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(out, optimize=True)


def main() -> None:
    """Command line: results.json -> PNG."""
    parser = argparse.ArgumentParser(prog="python -m training.plot", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results.json written by training.plan")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    draw(args.results, args.out)


if __name__ == "__main__":
    main()
