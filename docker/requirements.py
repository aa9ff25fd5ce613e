"""Print the package's dependencies, so that an image layer can hold them apart from its source.

Purpose: `python requirements.py extra,extra` beside pyproject.toml.
Does not know: versions, which constraints.txt pins.
Invariant: the standard library is enough.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Write one requirement a line to standard output. Raises SystemExit for an unknown extra."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in filter(None, sys.argv[1].split(",") if len(sys.argv) > 1 else []):
        if extra not in project["optional-dependencies"]:
            known = ", ".join(project["optional-dependencies"])
            sys.exit(f"unknown extra {extra!r}; there are: {known}")
        requirements += project["optional-dependencies"][extra]
    sys.stdout.write("\n".join(requirements) + "\n")


if __name__ == "__main__":
    main()
