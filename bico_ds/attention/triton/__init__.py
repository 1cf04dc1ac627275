"""Attention in one pass over packed rows, by Triton kernels. Only `ops.py` and what it imports need Triton itself."""
