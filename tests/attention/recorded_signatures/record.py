"""Write down the signatures of attention kernels that our wrappers call, as files beside this one.

`record.py ARCHIVE…`: of source archives and wheels of flash-attn and flash-attn-4 (`pip download --no-deps`), read without
running them. `record.py FOLDER`: of flash-attn-3, by the folder `hopper` of a checkout of its sources. `record.py torch`: of
the torch that runs this.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
# By distribution, the module and its functions; the module's path follows the archive's own folder, if it has one.
KERNELS = {
    "flash-attn": (
        "flash_attn/flash_attn_interface.py",
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    ),
    "flash-attn-4": ("flash_attn/cute/interface.py", ("_flash_attn_fwd", "_flash_attn_bwd")),
}
OPERATORS = "flash_api_stable.cpp"
ATEN = (
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def read_source(archive: Path, module: str) -> str:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(module).decode()
    with tarfile.open(archive) as sources:
        root = sources.getnames()[0].split("/")[0]
        file = sources.extractfile(f"{root}/{module}")
        assert file is not None
        return file.read().decode()


def output_counts(function: ast.FunctionDef) -> list[int]:
    """How many values it may return; 0: one that is no tuple."""
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    values = [part for v in values for part in ((v.body, v.orelse) if isinstance(v, ast.IfExp) else (v,))]
    return sorted({len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in values})


def record_archive(archive: Path) -> None:
    name, version = re.match(r"([a-z_]+(?:_4)?)-(\d[^-]*?)(?:-py3.*\.whl|\.tar\.gz)$", archive.name).groups()
    distribution = name.replace("_", "-")
    module, names = KERNELS[distribution]
    functions = {
        node.name: {"parameters": ast.unparse(node.args), "outputs": output_counts(node)}
        for node in ast.walk(ast.parse(read_source(archive, module)))
        if isinstance(node, ast.FunctionDef) and node.name in names
    }
    assert functions.keys() == set(names), f"{archive}: found {sorted(functions)}"
    write(
        distribution,
        version,
        {"source": f"{archive.name}: {module}", "module": module, "functions": functions},
    )


def record_operators(folder: Path) -> None:
    """The schemas of flash-attn-3's operators: C++ string literals, one after the other."""
    version = re.search(r'__version__ = "(.*)"', (folder / "__init__.py").read_text(encoding="utf-8")).group(
        1
    )
    source = (folder / OPERATORS).read_text(encoding="utf-8")
    definitions = [
        "".join(re.findall(r'"(.*?)"', text)) for text in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL)
    ]
    functions = {text.split("(")[0]: re.sub(r",(?=\S)", ", ", text) for text in definitions}
    record = {"source": f"hopper/{OPERATORS}", "module": "flash_attn_interface.py"}
    write("flash-attn-3", version, record | {"functions": {name: functions[name] for name in ("fwd", "bwd")}})


def record_torch() -> None:
    import torch

    schemas = {name: str(getattr(torch.ops.aten, name).default._schema) for name in ATEN}
    version = torch.__version__.split("+")[0]
    write("torch", version, {"source": f"torch {torch.__version__}: torch.ops.aten", "functions": schemas})


def write(distribution: str, version: str, record: dict) -> None:
    path = HERE / f"{distribution}-{version}.json"
    text = json.dumps({"distribution": distribution, "version": version, **record}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument == "torch":
            record_torch()
        elif Path(argument).is_dir():
            record_operators(Path(argument))
        else:
            record_archive(Path(argument))
