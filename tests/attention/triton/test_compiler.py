"""Without a C compiler Triton launches nothing: that is known before, as Triton itself would find it."""

from __future__ import annotations

import pytest
import torch

from bico_ds.attention.triton.ops import triton_refusal


def triton_finds_a_compiler(folder) -> bool:
    """By its own function, as for every module that launches a kernel."""
    # Not at the top: the tests in the interpreter, which may share this process, say first what triton is to be.
    build = pytest.importorskip("triton.runtime.build", reason="Triton is not installed here")
    if remembered := getattr(build, "_find_compiler", None):
        remembered.cache_clear()  # Triton 3.8 looks once
    try:
        build._build("launcher", "launcher.c", str(folder), [], [], [], [])
    except (RuntimeError, OSError):
        return False
    return True


@pytest.mark.parametrize("named", [None, "other-cc", "missing-cc"])
@pytest.mark.parametrize(
    "there", [(), ("gcc",), ("clang",), ("cc",)], ids=lambda names: "+".join(names) or "none"
)
def test_the_triton_kernels_are_refused_where_triton_finds_no_c_compiler(there, named, tmp_path, monkeypatch):
    for name in (*there, "other-cc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    # What comes after the compiler is the dtype: no GPU has to be there.
    refusal = triton_refusal(torch.float32, 128, torch.device("cuda"))
    if triton_finds_a_compiler(tmp_path):
        assert refusal == "takes float16 or bfloat16, not float32"
    else:
        assert refusal is not None and refusal.startswith("needs a C compiler ($CC, else gcc or clang)")
