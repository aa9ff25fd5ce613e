"""Engines that answer the same requests, each in its own process: ours and those it is compared with."""
