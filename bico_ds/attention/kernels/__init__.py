"""Causal varlen flash kernels, one file each, behind one Protocol (`base.CausalKernel`)."""
