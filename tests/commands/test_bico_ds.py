"""The command `bico-ds`: it finds every command, and imports only the one that is asked for."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest

from bico_ds import __version__
from bico_ds.__main__ import COMMANDS, describe_commands
from bico_ds.common.command_line import Command
from tests import EARLIER_RUN, ROOT

INTERNAL = {"slurm.attempt", "slurm.native_ops"}  # for the batch script


def bico_ds(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bico_ds", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_every_command_has_a_name_and_a_line_of_help():
    folder = ROOT / "bico_ds" / "commands"
    files = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py")]
    modules = {".".join(file.parts) for file in files if file.name != "__init__"}
    # Beside a `command` lie its sub-commands.
    parts = {
        m for m in modules if f"{m.rpartition('.')[0]}.command" in modules and not m.endswith(".command")
    }
    assert set(COMMANDS.values()) == modules - INTERNAL - parts
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", describe_commands(), re.MULTILINE), name


@pytest.mark.parametrize("module", sorted({*COMMANDS.values(), *INTERNAL}))
def test_every_command_has_the_one_frame_and_its_own_example(module):
    found = import_module(f"bico_ds.commands.{module}")
    assert isinstance(found.main, Command)
    assert found.main.description == found.__doc__
    assert "\n    " in found.__doc__


def test_a_name_that_is_none_is_refused_with_a_similar_one():
    done = bico_ds("trian", "--recipe", "tiny_base")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'trian' (did you mean 'train'?)")


def test_the_version_is_the_package_s_own():
    assert bico_ds("--version").stdout == f"bico_ds {__version__}\n"


def test_a_command_names_itself_and_keeps_its_exit_code():
    done = bico_ds("train")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bico-ds train ")
    assert bico_ds("compare", "no-such-run").returncode == 2


SHIMS = [*sorted((ROOT / "launch").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
REPORTS_HEAVY = """
import atexit, runpy, sys
heavy = {"torch", "deepspeed", "transformers", "datasets", "matplotlib"}
atexit.register(lambda: print("heavy", sorted(heavy & set(sys.modules))))
"""


def check_light(start: str, *words: str) -> None:
    """`start` is Python code that runs a command with these words, of which `--help` is one."""
    command = [sys.executable, "-c", REPORTS_HEAVY + start, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("usage: ")
    assert done.stdout.endswith("heavy []\n"), done.stderr


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words))
def test_help_imports_no_torch(words):
    check_light("from bico_ds.__main__ import main; main()", *words, "--help")


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_the_help_of_a_script_imports_no_torch(path):
    check_light(f"runpy.run_path({str(path)!r}, run_name='__main__')", "--help")


def test_help_and_version_may_be_asked_for_in_the_usual_ways():
    assert (
        bico_ds("help").stdout == bico_ds("--help").stdout == bico_ds().stdout == describe_commands() + "\n"
    )
    assert bico_ds("help", "compare").stdout == bico_ds("compare", "--help").stdout
    assert bico_ds("help", "trian").returncode == 2
    assert bico_ds("-V").stdout == bico_ds("--version").stdout


@pytest.mark.parametrize("command", ["export", "train"])
def test_the_help_of_what_reads_checkpoints_says_that_they_are_trusted_input(command):
    shown = " ".join(bico_ds(command, "--help").stdout.split())
    assert re.search(r"[Tt]rusted input: .*run code", shown)


def arguments_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The parser's arguments and those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from arguments_of(inner)
        else:
            yield action


@pytest.mark.parametrize("module", sorted({*COMMANDS.values(), *INTERNAL}))
def test_every_argument_has_a_help_text_and_every_value_a_name(module):
    parser = argparse.ArgumentParser()
    import_module(f"bico_ds.commands.{module}").main.add_options(parser)
    for action in arguments_of(parser):
        if action.help == argparse.SUPPRESS:
            continue
        assert action.help, action.dest
        takes_value = action.option_strings and action.nargs != 0
        assert not takes_value or action.metavar or action.choices, action.dest


def test_the_same_option_has_the_same_words_in_every_command():
    found: dict[str, set[tuple[object, ...]]] = {}
    for module in ("train", "show.inspect_batch", "preflight", "slurm.submit", "slurm.native_ops"):
        parser = argparse.ArgumentParser()
        import_module(f"bico_ds.commands.{module}").main.add_options(parser)
        for action in parser._actions:
            for name in action.option_strings:
                text = str(action.help).partition("; ")[0]  # what follows is on job arrays
                found.setdefault(name, set()).add((text, action.metavar, action.dest))
    assert all(len(found[name]) == 1 for name in ("--recipe", "--set", "--output-dir"))


def run_without_reader(*words: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """Python with these words, and with a pipe as stdout that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.parametrize("words", ["--help", "train --help", "train --list-recipes", "status RUN"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_failure(words, unbuffered, tmp_path):
    """`status` prints a table of rich's."""
    (tmp_path / "state.json").write_text('{"state": "done", "step": 1, "reason": ""}')
    words = words.replace("RUN", str(tmp_path))
    done = run_without_reader("-m", "bico_ds", *words.split(), unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed, tmp_path):
    status = f"{sys.executable} -m bico_ds status {tmp_path} {closed}; echo $? > {tmp_path}/code"
    subprocess.run(["sh", "-c", status], cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert (tmp_path / "code").read_text() == "0\n"


# In the place of a training of minutes: a line of its console.
TRAINS_BRIEFLY = """
import rich.console
import bico_ds.commands.train
import bico_ds.training.start

bico_ds.training.start.train = lambda *_, **__: rich.console.Console().print("step 1")
bico_ds.commands.train.main.start()
"""


def test_training_that_loses_its_output_is_not_done():
    done = run_without_reader("-c", TRAINS_BRIEFLY, "--recipe", "tiny_base")
    assert done.returncode == 1
    assert done.stderr.endswith("error: stopped midway: its output is not read any more\n")


def test_training_keeps_the_reason_of_another_exit():
    ends = TRAINS_BRIEFLY.replace(
        'rich.console.Console().print("step 1")', 'sys.exit("DeepSpeed gives a reason")'
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{ends}", "--recipe", "tiny_base"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "DeepSpeed gives a reason" in done.stderr


def test_the_exit_code_of_an_export_without_a_reader_tells_whether_it_was_written(tmp_path):
    run, tokenizer = EARLIER_RUN / "run", EARLIER_RUN / "store" / "tokenizer"
    words = ["export", str(run), str(tmp_path / "export"), "--tokenizer", str(tokenizer)]
    done = run_without_reader("-m", "bico_ds", *words, unbuffered="1")
    assert (done.returncode, (tmp_path / "export").exists()) in [(1, False), (0, True)]


def test_a_pre_flight_that_loses_its_output_is_not_ready(tmp_path):
    words = ["preflight", "--recipe", "tiny_base", "--output-dir", str(tmp_path / "run")]
    assert run_without_reader("-m", "bico_ds", *words, "--set", f"data.cache_dir={tmp_path}").returncode == 1


SIGNALS_ITSELF = """
import os, signal, sys
from bico_ds.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

module = sys.argv.pop(1)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
main()
"""


@pytest.mark.parametrize("module", ["bico_ds.commands.show.inspect_batch", "bico_ds.training.assembly"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(module):
    command = [sys.executable, "-c", SIGNALS_ITSELF, module, "inspect", "--recipe", "tiny_base"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_a_script_takes_the_package_of_its_own_checkout(path, tmp_path):
    """Whichever is installed, and whatever comes first on PYTHONPATH."""
    other = tmp_path / "bico_ds"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another package was imported')")
    done = subprocess.run(
        [sys.executable, str(path), "--help"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:7]) == (0, "usage: "), done.stderr
