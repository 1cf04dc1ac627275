"""Packed bidirectional-causal attention: the plan of a batch, the op, its backends and its dense oracle."""
