"""Triton kernels, one file an op; each holds its maths, its kernels and a reference in plain torch."""
