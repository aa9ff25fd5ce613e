"""Kernels in Triton for CUDA devices. Import nothing from here without a look at `availability.py`."""
