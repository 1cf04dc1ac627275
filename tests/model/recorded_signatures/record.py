"""Write down the signatures of liger-kernel's functions that we call, as a file beside this one for each release.

`record.py WHEEL…` (`pip download --no-deps liger-kernel==VERSION`), read without running them.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

FUNCTIONS = {
    "liger_kernel.ops.fused_add_rms_norm": ("fused_add_rms_norm_forward", "fused_add_rms_norm_backward"),
    "liger_kernel.ops.rms_norm": ("rms_norm_forward", "rms_norm_backward"),
    "liger_kernel.ops.swiglu": ("swiglu_forward", "swiglu_backward"),
    "liger_kernel.ops.utils": ("calculate_settings",),
}


def read_module(wheel: Path, module: str) -> ast.Module:
    with zipfile.ZipFile(wheel) as files:
        return ast.parse(files.read(module.replace(".", "/") + ".py"))


def outputs(function: ast.FunctionDef) -> int:
    """How many values it returns, wherever it does."""
    (count,) = {len(node.value.elts) for node in ast.walk(function) if isinstance(node, ast.Return)}
    return count


def record(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    found = {
        module: {
            node.name: {"parameters": ast.unparse(node.args), "outputs": outputs(node)}
            for node in read_module(wheel, module).body
            if isinstance(node, ast.FunctionDef) and node.name in names
        }
        for module, names in FUNCTIONS.items()
    }
    assert all(found[module].keys() == set(names) for module, names in FUNCTIONS.items()), found
    text = json.dumps({"version": version, "source": wheel.name, "modules": found}, indent=1)
    (Path(__file__).parent / f"liger-kernel-{version}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        record(Path(argument))
