"""No call that could run a stranger's code leaves the question open: transformers asks on stdin where it is not told no."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import ROOT

# Every function of transformers, datasets and huggingface_hub that can be told to run code which came with the data.
ASKING = {
    "from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline", "get_dataset_config_names",
    "get_dataset_split_names",
}  # fmt: skip
NEVER = {"get_class_from_dynamic_module", "load_custom_generate", "register_for_auto_class", "get_kernel"}
# These read JSON alone, whatever stands in it.
DATA_ALONE = {"GenerationConfig"}
SOURCES = [
    *(file for room in ("bico_ds", "launch", "tools") for file in sorted((ROOT / room).rglob("*.py"))),
    *(file for file in sorted((ROOT / "tests").rglob("*.py")) if not file.name.startswith("test_")),
    *sorted(ROOT.glob("*.py")),
]


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def open_questions(source: str) -> list[int]:
    """The lines of calls that may ask and are not told `trust_remote_code=False`."""
    wrong = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or name_of(call) not in ASKING | NEVER:
            continue
        owner = getattr(getattr(call.func, "value", None), "id", None)
        told = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        said_no = [isinstance(value, ast.Constant) and value.value is False for value in told] == [True]
        if name_of(call) in NEVER or not (said_no or owner in DATA_ALONE):
            wrong.append(call.lineno)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_that_could_run_a_strangers_code_says_no(path: Path) -> None:
    assert not open_questions(path.read_text(encoding="utf-8"))


def test_open_questions_are_found() -> None:
    assert open_questions("AutoConfig.from_pretrained('x')\nload_dataset('x', trust_remote_code=None)") == [
        1,
        2,
    ]
    assert open_questions("AutoModel.from_config(c, trust_remote_code=True)\nget_kernel('a/b')") == [1, 2]
    assert open_questions("a.b().from_pretrained(p, **options)\nx = pipeline('text-generation')") == [1, 2]
    assert not open_questions(
        "AutoConfig.from_pretrained(p, trust_remote_code=False)\nGenerationConfig.from_pretrained(p)"
    )
