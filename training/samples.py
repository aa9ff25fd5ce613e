"""Writes sample texts of a model folder: fixed prompts, fixed seeds, nothing picked.

Purpose: show what a bundled model writes; sample i uses prompt i and seed i.
Doesn't know: training, scores.
Invariant: the same folder and versions give the same samples on the same kind of machine.
"""

import argparse
from pathlib import Path

import torch

PROMPTS = (
    "It was a dark and stormy night, and",
    "The old man looked at the child and said,",
    "Chapter I\n\nThe Arrival\n\n",
    '"You have been in the garden again," said Mrs. Barton.',
    "The ship had been three days out of Bristol when",
    "My friend threw down the newspaper and began to fill his pipe.",
    "There was once a king who had three daughters.",
    "She opened the letter with trembling fingers.",
    "London, in those days,",
    "When the train stopped at the little station,",
)
SETTINGS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def sample(folder: Path, max_new_tokens: int) -> list[str]:
    """One text per prompt, the prompt included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for seed, prompt in enumerate(PROMPTS):
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, **SETTINGS, max_new_tokens=max_new_tokens)
        texts.append(str(tokenizer.decode(ids[0], skip_special_tokens=False)))
    return texts


def as_markdown(texts: list[str]) -> str:
    """Numbered quotations with the prompt in bold."""
    parts = []
    for seed, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        head = " / ".join(line for line in prompt.split("\n") if line)
        body = "\n".join(f"> {line}".rstrip() for line in text[len(prompt) :].strip().split("\n"))
        parts.append(f"**Seed {seed}**, prompt: `{head}`\n\n{body}\n")
    return "\n".join(parts)


def main() -> None:
    """Command line: sample and write Markdown."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="tokens per sample (default 120)")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    args.out.write_text(as_markdown(sample(args.model, args.max_new_tokens)), encoding="utf-8")


if __name__ == "__main__":
    main()
