"""`megpt chat`: talk to a model in the terminal, in this process or on a server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_engine_options,
    add_sampling_options,
    engine_options,
    new_command,
    sampling_options,
)

Messages = list[dict[str, str]]
Answer = Callable[[Messages], Iterator[str]]

API_KEY_ENV: Final = "OPENAI_API_KEY"
ANSWER_TIMEOUT_S: Final = 600.0

_EXAMPLES = """\
  megpt chat demo
  megpt chat demo --system "You answer in one sentence." --temperature 0.7
  megpt chat demo --url http://127.0.0.1:8000        # a running `megpt serve`, or any OpenAI-shaped API
"""
_HELP = """\
/reset          forget the conversation
/system TEXT    begin anew with instructions for the model
/help           this
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(commands, "chat", summary="talk to a model in this terminal", examples=_EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="bundled model's name, checkpoint folder, hub id, or --url's id"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model")
    parser.add_argument("--url", help="talk to the server there instead of loading the model here")
    parser.add_argument("--api-key", metavar="KEY", help=f"for --url (default: ${API_KEY_ENV})")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read a line, show the answer, again and again."""
    from memory_efficient_gpt.errors import ConfigError

    if args.url is not None and (given := engine_options(args)):
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError([f"{names}: the server at --url has loaded the model already; leave this out."])
    with ExitStack() as stack:
        answer = _answers_of_server(args, stack) if args.url is not None else _answers_from_here(args, stack)
        if sys.stdin.isatty():
            print("/help shows the commands, Ctrl-D leaves.", file=sys.stderr)
        _converse(answer, args.system)
    return 0


def _converse(answer: Answer, system: str | None) -> None:
    from memory_efficient_gpt.errors import InvalidRequestError, OverloadedError

    messages = _beginning(system)
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                print(_HELP)
                continue
            case "/reset" | "/system":
                system = rest if command == "/system" else system
                messages = _beginning(system)
                continue
            case _ if command.startswith("/"):
                print(f"there is no command {command}; /help shows those there are", file=sys.stderr)
                continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _show(answer(messages))})
        except (InvalidRequestError, OverloadedError) as error:
            messages.pop()
            print(f"{error} (/reset begins anew)", file=sys.stderr)


def _beginning(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _read_line() -> str | None:
    """The next line; None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its line editing and history
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _show(deltas: Iterator[str]) -> str:
    """Print the answer as it comes; returns what there was of it. Ctrl-C ends the answer, not the chat."""
    text = ""
    try:
        for delta in deltas:
            text += delta
            print(delta, end="", flush=True)
    except KeyboardInterrupt:
        deltas.close()  # type: ignore[attr-defined]  # both sources are generators
    print()
    return text


def _answers_from_here(args: argparse.Namespace, stack: ExitStack) -> Answer:
    from memory_efficient_gpt.api import LLM
    from memory_efficient_gpt.request import SamplingParams

    params = SamplingParams(**sampling_options(args))
    llm = stack.enter_context(LLM(args.model, **engine_options(args)))
    return lambda messages: llm.stream(llm.tokenizer.apply_chat_template(messages), params)


def _answers_of_server(args: argparse.Namespace, stack: ExitStack) -> Answer:
    import httpx

    key = args.api_key or os.environ.get(API_KEY_ENV)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = args.url.rstrip("/").removesuffix("/v1")
    client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=ANSWER_TIMEOUT_S))
    options = sampling_options(args)
    return lambda messages: _stream(client, {"model": args.model, "messages": messages, **options})


def _stream(client: Any, body: dict[str, Any]) -> Iterator[str]:
    import httpx

    from memory_efficient_gpt.errors import EngineFailedError

    try:
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                raise _error(response.read(), response.status_code)
            with closing(response.iter_lines()) as lines:
                yield from _deltas(lines)
    except httpx.HTTPError as error:
        raise EngineFailedError(
            f"No answer from {client.base_url}: {error}. Is the server running?"
        ) from error


def _deltas(lines: Iterator[str]) -> Iterator[str]:
    """Text of server-sent chat chunks. Raises MegptError for an error in the stream."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise _error(data.encode(), 200)
        for choice in chunk["choices"]:
            if content := choice["delta"].get("content"):
                yield content


def _error(body: bytes, status: int) -> Exception:
    from memory_efficient_gpt.errors import EngineFailedError, InvalidRequestError, OverloadedError

    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:200] or f"status {status} without a reason"
    if status in (429, 503):
        return OverloadedError(message)
    return InvalidRequestError(message) if status == 400 else EngineFailedError(message)
