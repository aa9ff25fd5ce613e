"""Giving a model's layers native kernels, by structure and after a check."""
