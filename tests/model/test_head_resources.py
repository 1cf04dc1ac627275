"""The kernels of the head's softmax, compiled without a GPU: what they take, and for which sizes they are compiled anew.

In a process of its own: Triton compiles nothing where its interpreter is on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.attention.triton.interpreter import needs_triton

pytestmark = needs_triton

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
SCRIPT = """if True:
    import json, sys
    from tools.bench.triton_resources import ARCHITECTURES, compiled, registers_and_stack, torch

    from bico_ds.model.head_kernels import cross_entropy_launch, gradient_launch

    def kernels(architecture, dtype, rows, columns):
        # From row 1 on, as a chunk of odd size leaves it to the next: 4 or 8 bytes behind a place of 16.
        per_row = lambda dtype: torch.empty(1 + rows, dtype=dtype, device="meta")[rows % 2 :]
        labels, lse, losses = per_row(torch.int64), per_row(torch.float32), per_row(torch.float32)
        logits = torch.empty(rows, 128_256, dtype=dtype, device="meta")
        part = torch.empty(rows, columns, dtype=dtype, device="meta")
        launches = [cross_entropy_launch(logits, labels, lse, losses, gradient) for gradient in (True, False)]
        launches.append(gradient_launch(part, labels, lse, columns))
        return [compiled(launch, ARCHITECTURES[architecture]) for launch in launches]

    rows = []
    for architecture in sys.argv[1:]:
        for dtype in (torch.bfloat16, torch.float32):
            first, other = (kernels(architecture, dtype, *size) for size in ((512, 8016), (77, 7984)))
            for kernel, again in zip(first, other, strict=True):
                registers, stack = registers_and_stack(kernel.asm["cubin"])
                ptx = kernel.asm["ptx"]
                wide = "ld.global.v4" in ptx and ("st.global.v4" in ptx or kernel is first[1])
                row = {"registers": registers, "stack": stack, "wide": wide, "again": kernel is not again}
                rows.append({"architecture": architecture, **row})
    print(json.dumps(rows))
"""


@pytest.mark.slow
def test_the_kernels_fit_every_architecture_and_other_sizes_need_no_other_compilation():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tools" / "bench")))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *ARCHITECTURES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 6 * len(ARCHITECTURES)
    for row in rows:
        # With at most 64 registers two programs of 16 warps share a multiprocessor: one loads while the other reduces.
        assert row["registers"] <= 64 and row["stack"] == 0, row
        assert row["wide"], "a thread loads and stores less than 16 bytes at a time"
        assert not row["again"], "a batch of another size must not stop training for a compilation"
