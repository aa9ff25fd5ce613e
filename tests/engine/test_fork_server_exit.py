"""The fork server ends at once; nobody else does."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os, sys
import memory_efficient_gpt.fork_server_exit

class Last:
    def __del__(self) -> None:
        print("taken apart", flush=True)

last = Last()
print("flushed", end="")
if sys.argv[1] == "child" and (child := os.fork()):
    os.waitpid(child, 0)
    os._exit(0)
"""


def output(who: str) -> str:
    ended = subprocess.run([sys.executable, "-c", SCRIPT, who], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout


def test_output_is_flushed_and_nothing_is_taken_apart() -> None:
    assert output("owner") == "flushed"


def test_a_forked_child_ends_as_ever() -> None:
    assert output("child") == "flushedtaken apart\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    script = "import memory_efficient_gpt.fork_server_exit\nprint('never read')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()
