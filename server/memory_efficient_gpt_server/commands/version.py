"""`megpt version`."""

from __future__ import annotations

import argparse

from memory_efficient_gpt_server.commands.options import Commands, new_command


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(commands, "version", summary="print the version", examples="  megpt version")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the version of the program and of what it runs on; imports none of it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from memory_efficient_gpt import __version__

    parts = [f"python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} missing")
    print(f"megpt {__version__} ({', '.join(parts)})")
    return 0
