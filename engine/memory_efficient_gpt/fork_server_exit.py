"""Makes the process that imports it end at once when it ends: for the fork server, and nothing else.

Purpose: named in `set_forkserver_preload`; importing it is its whole effect.
Does not know: what the process is for.
Invariant: output is flushed, and nothing else is done between the last statement and the end. Forked children
are not concerned: they end by `os._exit` themselves, or keep their own way to end if they don't.

An interpreter that has imported torch and transformers takes itself apart in one to three seconds.
Nobody waits for the fork server, but whoever looks would find it alive when its server is gone.
"""

import atexit
import contextlib
import os
import sys


def _end_at_once(owner: int) -> None:
    if os.getpid() == owner:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it is gone, or it is closed
                stream.flush()
        os._exit(0)


atexit.register(_end_at_once, os.getpid())
