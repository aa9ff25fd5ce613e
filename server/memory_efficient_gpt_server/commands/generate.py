"""`megpt generate`: continue a text in this process."""

from __future__ import annotations

import argparse
import os
import shlex
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
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="bundled model's name, checkpoint folder, or hub id (not the text: that is -p TEXT)",
    )
    parser.add_argument("stray", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--prompt", "-p", metavar="TEXT", help="the text to continue (default: what comes on standard input)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of text"
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    from memory_efficient_gpt.errors import ConfigError, InvalidRequestError

    if args.stray:
        text, model = shlex.quote(" ".join(args.stray)), shlex.quote(args.model)
        raise ConfigError([f"the text to continue goes to -p: megpt generate {model} -p {text}"])
    if args.prompt is None and sys.stdin.isatty():
        if not _could_be_model(args.model):
            raise InvalidRequestError(_no_prompt(args.model), param="prompt")
        print(f"{args.model} is the model; type the text to continue, then Ctrl-D:", file=sys.stderr)
    prompt: str = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise InvalidRequestError(_no_prompt(args.model), param="prompt")
    params = sampling_params(args, max_tokens=DEFAULT_MAX_TOKENS)

    from memory_efficient_gpt.api import LLM

    with LLM(args.model, **engine_options(args)) as llm:
        show = _show_json if args.json else _show_text
        show(llm, prompt, params)
    return 0


def _could_be_model(name: str) -> bool:
    """Whether a person who typed this may have meant a model: names have no spaces, folders may."""
    return not any(character.isspace() for character in name) or os.path.exists(name)


def _no_prompt(model: str) -> str:
    from memory_efficient_gpt_server.wording import clipped

    could_be, model = _could_be_model(model), clipped(model, 60)
    if could_be:
        command = f'megpt generate {shlex.quote(model)} -p "The old house stood"'
        taken = f"{model!r} was taken as the model; the text"
    else:
        command = f"megpt generate demo -p {shlex.quote(model)}"
        taken = f"{model!r} was taken as the model, which comes first; the text"
    return f"The prompt is empty. {taken} to continue goes to --prompt (-p) or standard input: {command}"


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
