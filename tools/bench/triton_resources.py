#!/usr/bin/env python
"""What each Triton kernel takes of a GPU: registers, stack, shared memory. Compiled for GPUs that need not be there.

    python tools/bench/triton_resources.py --architecture sm_90 --head-dim 128 --dtype bfloat16 --mode causal [--json]
    python tools/bench/triton_resources.py --out docs/benchmarks/triton_resources.md     # all of them

The package's own launches are compiled, for tensors on the meta device, with the tiling that each architecture has. A
register or a stack byte is one thread's; shared memory is one program's. `products`: the tensor-core instruction.
`loads`: in the loops over keys or rows, how many loads are asynchronous, of how many.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import this_checkout  # noqa: F401  first on sys.path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bico_ds.attention.triton.launches import backward_launches, forward_launches
from bico_ds.attention.triton.operands import Operands
from bico_ds.attention.triton.pass_ops import gathered_launch, merged_launch, rotated_launch, summed_launch
from bico_ds.attention.triton.tilings import TILINGS, tiling_of
from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path
from bico_ds.native.triton_kernels import Launch

ROWS, KEPT = 8192, 8000  # of the batch; no kernel depends on them
HEADS, KEY_HEADS = 32, 8
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("causal", "bidirectional")
PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One kernel, compiled."""

    architecture: str
    head_dim: int
    dtype: str
    mode: str
    kernel: str
    tile: str
    registers: int
    stack: int
    shared: int
    products: str
    loads: str


def architecture_name(capability: tuple[int, int]) -> str:
    return f"sm_{10 * capability[0] + capability[1]}"


ARCHITECTURES = {architecture_name(capability): capability for capability in TILINGS}


class CompilingDriver:
    """Stands for a GPU of a compute capability that Triton only compiles for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.device = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)


def launches(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    rows: int = ROWS,
    kept: int = KEPT,
) -> list[Launch]:
    """The launches of a forward and a backward pass, without second ones of a kernel."""
    attention = attention_launches(capability, head_dim, dtype, causal=causal, rows=rows, kept=kept)
    return attention + pass_launches(head_dim, dtype, causal=causal, rows=kept)


def attention_launches(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, *, causal: bool, rows: int, kept: int
) -> list[Launch]:
    """Of the kernels that attend."""

    def indices(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    tiling = tiling_of(capability, head_dim)
    q = torch.empty(rows, HEADS, head_dim, dtype=dtype, device="meta")
    k = torch.empty(rows, KEY_HEADS, head_dim, dtype=dtype, device="meta")
    table = torch.empty(rows, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(HEADS, rows + 1, dtype=torch.float32, device="meta").t()
    operands = Operands(
        q=q,
        k=k,
        v=torch.empty_like(k),
        cos=table,
        sin=table,
        rows=indices(rows),
        split=indices(rows),
        query_blocks=indices(200, 4),
        key_blocks=indices(200, 7),
        num_kept=kept,
        block_rows=tiling.blocks.rows,
        block_keys=tiling.blocks.keys,
        scale=head_dim**-0.5,
        causal=causal,
    )
    forward = forward_launches(operands, tiling, q, lse)
    return forward + backward_launches(operands, tiling, q, lse, q, q, k, k)[1:]


def pass_launches(head_dim: int, dtype: torch.dtype, *, causal: bool, rows: int) -> list[Launch]:
    """Of the kernels around the flash passes, of all kept rows where they are, with live rows behind them."""

    def pass_rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v and lse of a pass."""
        q = torch.empty(count, HEADS, head_dim, dtype=dtype, device="meta")
        k = torch.empty(count, KEY_HEADS, head_dim, dtype=dtype, device="meta")
        return q, k, torch.empty_like(k), torch.empty(HEADS, count, device="meta")

    q, k, v, lse = pass_rows(rows)
    q2, k2, v2, lse2 = (None,) * 4 if causal else pass_rows(rows - 4)
    table = torch.empty(rows, head_dim, dtype=dtype, device="meta")
    places = None if causal else torch.empty(rows, dtype=torch.int32, device="meta")
    ends = (None, places)
    return [
        rotated_launch(q, k, v, table, table, None, None, *ends, 0.0, 0.0, q, k, None, q2, k2, v2),
        merged_launch(q, lse, q2, lse2, *ends, q, lse.t()),
        gathered_launch(q, q, lse.t(), *ends, rows, q, q, lse, q2, q2, lse2),
        summed_launch(q, k, v, q2, k2, v2, table, table, *ends, True, q, k, v),
    ]


def compiled(launch: Launch, capability: tuple[int, int]) -> triton.compiler.CompiledKernel:
    driver.set_active(CompilingDriver(capability))
    return launch.kernel.warmup(grid=(launch.programs,), **launch.arguments, **launch.options)


def resources(capability: tuple[int, int], head_dim: int, dtype: str, mode: str) -> Iterator[Resources]:
    """Of each kernel of a forward and a backward pass."""
    for launch in launches(capability, head_dim, DTYPES[dtype], causal=mode == "causal"):
        kernel = compiled(launch, capability)
        registers, stack = registers_and_stack(kernel.asm["cubin"])
        yield Resources(
            architecture=architecture_name(capability),
            head_dim=head_dim,
            dtype=dtype,
            mode=mode,
            kernel=launch.kernel.__name__.removesuffix("_kernel"),
            tile=tile_of(launch),
            registers=registers,
            stack=stack,
            shared=kernel.metadata.shared,
            products=", ".join(name for name, found in PRODUCTS.items() if found in kernel.asm["ptx"]),
            loads=loads_in_loops(kernel.asm["ttgir"]),
        )


def tile_of(launch: Launch) -> str:
    """What a program computes at a time, and by how many warps; of kernels without products nothing."""
    if launch.warps is None:
        return ""
    rows, keys = launch.arguments["BLOCK"], launch.arguments["KEYS"]
    return f"{rows} x {keys}, {launch.warps} warps, {launch.stages} stages"


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"])


def loads_in_loops(ttgir: str) -> str:
    """`asynchronous of all` loads of tiles or rows in loops."""
    depth, pipelined, waited = None, 0, 0
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if depth is None and " scf.for " in line:
            depth = indent
        elif depth is not None and indent <= depth and line.strip().startswith("}"):
            depth = None
        elif depth is not None:
            pipelined += "async_copy_global_to_local" in line
            waited += "tt.load" in line and "tensor<" in line
    return f"{pipelined} of {pipelined + waited}" if pipelined + waited else ""


def chosen(options: Namespace) -> Iterator[Resources]:
    """What is asked for; by default every dtype and mode of sm_90, and bf16 in both directions of the others."""
    for name in options.architecture:
        all_of_it = name == "sm_90"
        for head_dim in options.head_dim:
            for dtype in options.dtype or (DTYPES if all_of_it else ["bfloat16"]):
                for mode in options.mode or (MODES if all_of_it else ["bidirectional"]):
                    yield from resources(ARCHITECTURES[name], head_dim, dtype, mode)


def table(rows: list[Resources]) -> str:
    """The rows as Markdown."""
    names = [field.name for field in fields(Resources)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, asdict(row).values())) + " |" for row in rows)])


def page(rows: list[Resources]) -> str:
    ptxas = {
        name: re.search(r"release ([\d.]+)", subprocess.check_output([TOOLS / name, "--version"], text=True))
        for name in ("ptxas", "ptxas-blackwell")
    }
    versions = ", ".join(f"{name} {found.group(1)}" for name, found in ptxas.items() if found)
    return f"""# Benchmark: what the Triton kernels take of a GPU

```bash
python tools/bench/triton_resources.py --out docs/benchmarks/triton_resources.md
```

With Triton {triton.__version__} ({versions}), on a machine without a GPU: the kernels are compiled, not run. No GPU has
compared their tiles with others. Head dimension 96 is padded to 128. The tests compile them again (`make test` those of head
dimension 128, bf16, both directions), and allow no kernel more stack than stands here.

Registers and stack (bytes) are per thread, shared memory (bytes) per program; `products` names the tensor-core
instruction; `loads`: how many of the loads in the loops over keys or rows are asynchronous.

{table(rows)}
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--mode", nargs="+", choices=MODES)
    parser.add_argument("--out", type=local_path, metavar="FILE", help="write the page of the documentation")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: Namespace) -> None:
    rows = []
    for row in chosen(options):
        rows.append(row)
        print(" ".join(map(str, asdict(row).values())), flush=True)
    if options.out:
        options.out.write_text(page(rows), encoding="utf-8")
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


main = Command(description=__doc__, add_options=add_options, run=run)

if __name__ == "__main__":
    main.start()
