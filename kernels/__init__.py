"""Triton kernels for training and decoding; docs/kernels.md says which file does what."""
