"""The image of a rented GPU may lack hypothesis: there the tests of the CUDA backends, which need none, run all the same."""

from __future__ import annotations

import importlib.util

HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
collect_ignore = (
    [] if HAS_HYPOTHESIS else ["test_fused.py", "test_packed_attention.py", "triton/test_interpreted.py"]
)
