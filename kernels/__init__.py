"""Triton kernels, one file an op; with its maths, its kernels and a plain torch reference."""
