"""`megpt generate`: continue a text in this process."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_engine_options,
    add_sampling_options,
    engine_options,
    new_command,
    sampling_params,
)

if TYPE_CHECKING:
    from memory_efficient_gpt.api import LLM
    from memory_efficient_gpt.request import SamplingParams

DEFAULT_MAX_TOKENS: Final = 256

_EXAMPLES = """\
  megpt generate demo -p "The old house stood"
  megpt generate demo -p "Once upon a time" -n 64 --temperature 0.8 --seed 7
  megpt generate ./my-model --stop "The end" < prompt.txt
  megpt generate demo -p "Hello" --json | jq -r .text
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "generate", summary="continue a text, shown as it comes", examples=_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="bundled model's name, checkpoint folder, or hub id")
    parser.add_argument(
        "--prompt", "-p", metavar="TEXT", help="the text to continue (default: standard input)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of text"
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    from memory_efficient_gpt.errors import InvalidRequestError

    if args.prompt is None and sys.stdin.isatty():
        print("type the text to continue, then Ctrl-D:", file=sys.stderr)
    prompt: str = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise InvalidRequestError(
            "The prompt is empty. Give --prompt TEXT or pipe a text in.", param="prompt"
        )
    params = sampling_params(args, max_tokens=DEFAULT_MAX_TOKENS)

    from memory_efficient_gpt.api import LLM

    with LLM(args.model, **engine_options(args)) as llm:
        show = _show_json if args.json else _show_text
        show(llm, prompt, params)
    return 0


def _show_text(llm: LLM, prompt: str, params: SamplingParams) -> None:
    if sys.stdout.isatty():
        print(prompt, end="", flush=True)
    started = time.monotonic()
    for delta in llm.stream(prompt, params):
        print(delta, end="", flush=True)
    print()
    if sys.stderr.isatty():
        seconds, num_tokens = time.monotonic() - started, llm.stats.generated_tokens
        print(f"[{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s]", file=sys.stderr)


def _show_json(llm: LLM, prompt: str, params: SamplingParams) -> None:
    import json

    started = time.monotonic()
    completion = llm.generate(prompt, params)
    (choice,) = completion.choices
    result = {
        "model": llm.info.model,
        "prompt": prompt,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": len(completion.prompt_token_ids),
        "completion_tokens": len(choice.token_ids),
        "seconds": round(time.monotonic() - started, 4),
    }
    print(json.dumps(result, ensure_ascii=False))
