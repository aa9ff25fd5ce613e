"""Exit 0 if the server in this container can take requests.

Purpose: the image's HEALTHCHECK.
Does not know: keys; /readyz needs none.
Invariant: the standard library is enough.
"""

import os
import sys
import urllib.error
import urllib.request


def main() -> None:
    """Ask /readyz once; a refusal, a timeout or a status other than 200 is an exit status of 1."""
    port = os.environ.get("MEGPT_PORT", "8000")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as response:
            sys.exit(0 if response.status == 200 else 1)
    except (urllib.error.URLError, TimeoutError) as error:
        sys.exit(f"not ready: {error}")


if __name__ == "__main__":
    main()
