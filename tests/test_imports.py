"""The rooms of the house import in one direction only (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

FLOORS = (
    {"common"},
    {"config", "native", "named_parts"},
    {"documents", "attention"},
    {"batch", "optim", "planner"},
    {"runtime"},
    {"objectives", "model"},
    {"data", "checkpoint"},
    {"evaluation", "cluster"},
    {"training", "proof"},
    {"commands"},
    {"__main__"},
    {"launch", "tools"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = ("launch", "tools")
MOST_MODULES = 15


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] in ENTRANCES else Path(parts[1]).stem


def may_import(room: str, other: str) -> bool:
    return room == other or FLOOR_OF[other] < FLOOR_OF[room]


def imported_modules(path: Path) -> set[str]:
    """All modules that a file imports, at its top or in a function; names imported from one may be modules too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def modules_named(path: Path) -> set[str]:
    """The modules of ours that a file imports, and the packages that hold them."""
    ours = [module.split(".") for module in imported_modules(path) if module.startswith("bico_ds.")]
    return {".".join(parts[:end]) for parts in ours for end in range(2, len(parts) + 1)}


def imported_rooms(path: Path) -> set[str]:
    return {module.split(".")[1] for module in modules_named(path)} - {"__version__"}


SOURCES = [p for folder in ("bico_ds", *ENTRANCES) for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_lower_floors_only(path):
    if path == ROOT / "bico_ds" / "__init__.py":
        (only,) = ast.parse(path.read_text()).body
        assert ast.unparse(only).startswith("__version__ = "), (
            "the package's __init__ holds the version alone: what needs no torch must import none"
        )
        return
    wrong = {other for other in imported_rooms(path) if not may_import(room_of(path), other)}
    assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}, on its own floor or above"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_absolute(path):
    """A relative import would name no room, and pass the test above."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]


HEAVY = {"torch", "deepspeed", "transformers"}
# What neither names nor loads them; a room or package stands for all its modules.
TORCH_FREE = (
    "__main__",
    "common",
    "config",
    "documents",
    "planner",
    "named_parts",
    *(f"runtime.{name}" for name in ("run_folder", "lock", "launch_environment", "signals", "launcher")),
    "runtime.output",
    *(f"runtime.nodes.{name}" for name in ("failed_node", "gpu_errors", "slow_rank")),
    "evaluation.results",
    "evaluation.report",
    "cluster.attempts",
    *(f"cluster.{name}" for name in ("bad_nodes", "batch_script", "batch_words", "code", "job", "local")),
    *(f"cluster.{name}" for name in ("offline", "prologue", "run_status", "submission", "sweep")),
    "training.callbacks.tensorboard.tags",
    *(f"training.profile.{name}" for name in ("names", "partition", "request", "table", "trace_file")),
    "proof.prove",
    "commands.show.compare",
    "commands.gpu_proof",
    "commands.show.explain",
    "commands.show.explain_step",
    "commands.show.plan",
    "commands.show.tensorboard",
    "commands.show.report",
    "commands.slurm.attempt",
    "commands.slurm.status",
)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_needs_no_torch_names_none_and_loads_none_through_any_import(name):
    path = ROOT / "bico_ds" / name.replace(".", "/")
    files = sorted(path.rglob("*.py")) or [path.with_suffix(".py")]
    for file in files:
        assert not HEAVY & {module.split(".")[0] for module in imported_modules(file)}, file
    modules = ", ".join(map(module_name, files))
    loaded = f"import sys, {modules}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    "package", [p.parent for p in SOURCES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_package_is_a_crowd(package):
    modules = [p.name for p in package.glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{package.name} holds {len(modules)} modules"


@pytest.mark.parametrize("path", sorted((ROOT / "bico_ds" / "planner").rglob("*.py")), ids=lambda p: p.stem)
def test_the_planner_rests_on_recipes_alone(path):
    """It plans on laptops and login nodes, from what is written: no data, no attention, no engine."""
    assert imported_rooms(path) <= {"planner", "config", "common"}, path


@pytest.mark.parametrize(("tower", "other"), [("prepare", "loading"), ("loading", "prepare")])
def test_preparing_and_loading_data_share_the_store_and_the_tokenizer_alone(tower, other):
    for path in (ROOT / "bico_ds" / "data" / tower).glob("*.py"):
        assert f"bico_ds.data.{other}" not in modules_named(path), path
    for name in ("store.py", "tokenizer.py"):
        assert f"bico_ds.data.{tower}" not in modules_named(ROOT / "bico_ds" / "data" / name), name
