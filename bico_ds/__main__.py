"""BICO fine-tuning for Llama-like models on DeepSpeed: `bico-ds NAME …`, or `python -m bico_ds NAME …`.

Only the chosen command is imported: `--help` here needs no torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from bico_ds import __version__
from bico_ds.common.command_line import Command, exit_code
from bico_ds.common.errors import did_you_mean
from bico_ds.common.process_end import end_process

# In the order in which a user needs them; each with its module in bico_ds/commands/.
GROUPS = {
    "first steps": {"demo": "demo", "cures": "cures", "gpu-proof": "gpu_proof"},
    "models and data": {
        "fetch-model": "fetch_model",
        "import-gguf": "import_gguf",
        "prepare": "prepare.command",
        "search-split": "search_split",
        "inspect": "show.inspect_batch",
    },
    "training": {
        "explain": "show.explain",
        "plan": "show.plan",
        "train": "train",
        "sweep": "sweep",
        "explain-step": "show.explain_step",
        "preflight": "preflight",
        "submit": "slurm.submit",
        "status": "slurm.status",
    },
    "results": {
        "tensorboard": "show.tensorboard",
        "evaluate": "evaluate",
        "compare": "show.compare",
        "report": "show.report",
        "export": "export",
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def main() -> NoReturn:
    """Run the command that the command line names, and end this process."""
    end_process(exit_code(lambda: run(sys.argv[1:])))


def run(words: Sequence[str]) -> int:
    """Run the command that the first word names; return its exit code. Raises `SystemExit` as `Command` does."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    name, *arguments = words or ["--help"]
    if name in ("-h", "--help"):
        print(describe_commands())
        return 0
    if name in ("-V", "--version"):
        print(f"bico_ds {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: unknown command '{name}'{hint}; bico-ds --help lists all", file=sys.stderr)
        return 2
    command: Command = import_module(f"bico_ds.commands.{COMMANDS[name]}").main
    return command(arguments, prog=f"bico-ds {name}")


def describe_commands() -> str:
    """The help: every command with the first line of its own."""
    assert __doc__ is not None
    lines = ["usage: bico-ds COMMAND …", "", __doc__.split(":")[0] + "."]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<14}{summary(module)}" for name, module in group.items())]
    return "\n".join(
        [
            *lines,
            "",
            "bico-ds COMMAND --help, or bico-ds help COMMAND, shows its options; bico-ds --version the version.",
        ]
    )


def summary(module: str) -> str:
    """The first line of a command's docstring, read without importing the command."""
    file = Path(__file__).parent / "commands" / f"{module.replace('.', '/')}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text is not None, file
    return text.splitlines()[0]


if __name__ == "__main__":
    main()
