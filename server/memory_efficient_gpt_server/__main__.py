"""`python -m memory_efficient_gpt_server` is `megpt`."""

from memory_efficient_gpt_server.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
