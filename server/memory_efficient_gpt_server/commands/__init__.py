"""The commands of `megpt`, one module each: `add_parser` describes it, `run` does it."""
