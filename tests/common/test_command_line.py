"""The frame of the commands: messages, exit codes, and which rank shows an error."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from bico_ds.common import command_line
from bico_ds.common.command_line import Command, exit_code
from bico_ds.common.errors import RunError, UserError


def command(work, **more) -> Command:
    return Command(description="About.\n\n    an example", add_options=add_options, run=work, **more)


def add_options(parser) -> None:
    parser.add_argument("--count", type=int, default=1)


def failing(error: BaseException, **more) -> Command:
    def work(options):
        raise error

    return command(work, **more)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("seed: none"), 2), (RunError("disk full"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_ends_a_command_is_one_message_and_an_exit_code(capsys, error, code):
    assert exit_code(lambda: failing(error)([])) == code
    assert capsys.readouterr().err == (f"error: {error}\n" if str(error) else "")


def test_no_message_shows_a_secret(capsys):
    assert failing(UserError("'https://me:abc123@host': no such folder"))([]) == 2
    for words in (["--token", "abc123"], ["--token=abc123"], ["--count", "https://me:abc123@host"]):
        with pytest.raises(SystemExit):
            command(print)(words)
    shown = capsys.readouterr().err
    assert "abc123" not in shown
    assert shown.count("(not recorded)") == 4
    assert "argument --count: invalid int value: 'https://me:(not recorded)@host'" in shown


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (2, 2)])
def test_an_exit_keeps_its_code(given, code):
    assert exit_code(lambda: sys.exit(given)) == code


def test_ctrl_c_while_options_are_added_is_no_traceback():
    """As in the imports of a command, which come before its options."""
    interrupt = "lambda parser: os.kill(os.getpid(), signal.SIGINT)"
    code = "import os, signal\nfrom bico_ds.common.command_line import Command\n"
    code += (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    )
    code += f"Command(description='', add_options={interrupt}, run=print).start()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())([])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_command_may_return_a_code_of_its_own(returned, code):
    assert command(lambda options: returned)([]) == code


def test_options_that_contradict_each_other_are_wrong_usage(capsys):
    refuses = command(
        print, contradiction=lambda options: "--count 3 is unlucky" if options.count == 3 else None
    )
    with pytest.raises(SystemExit) as ended:
        refuses(["--count", "3"], prog="bico-ds it")
    assert ended.value.code == 2
    assert "bico-ds it: error: --count 3 is unlucky" in capsys.readouterr().err
    assert refuses(["--count", "4"]) == 0


def test_the_description_keeps_its_lines(capsys):
    with pytest.raises(SystemExit):
        command(print)(["--help"])
    assert "About.\n\n    an example\n" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_only_the_first_rank_shows_an_error_and_the_others_wait_for_it(monkeypatch, capsys, rank, shown):
    seconds = 60 if shown else 0.3
    monkeypatch.setattr(command_line, "_SECONDS_FOR_MESSAGE", seconds)
    started = time.monotonic()
    assert failing(UserError("seed: none"), rank=lambda: rank)([]) == 2
    assert (time.monotonic() - started >= seconds) is not shown
    assert ("seed: none" in capsys.readouterr().err) is shown


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (BrokenPipeError("of a socket"), "BrokenPipeError: of a socket\n"),
        (ZeroDivisionError("by none"), "ZeroDivisionError: by none\n"),
        (SystemExit("the first rank is gone"), "the first rank is gone\n"),
    ],
)
def test_what_nobody_expected_is_a_failure_that_python_shows(capsys, error, shown):
    """And not passed on: the interpreter's own end aborts a process with threads in native code."""
    assert exit_code(lambda: failing(error, rank=lambda: 0)([])) == 1
    message = capsys.readouterr().err
    assert message.endswith(shown)
    assert ("Traceback" in message) is not isinstance(error, SystemExit)


def run_without_reader(
    work: str, *, only_shows: bool = True, unbuffered: str = "", stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """A command that does this, with a pipe as stdout that nobody reads any more."""
    code = "import rich.console, sys\nfrom bico_ds.common.command_line import Command\n"
    code += "from bico_ds.common.errors import RunError\n"
    code += f"def work(options):\n    {work}\n"
    code += "Command(description='', add_options=lambda parser: None, run=work, rank=lambda: 0, "
    code += f"only_shows=lambda options: {only_shows}).start()"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-c", code], stdout=writing, stderr=stderr, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    "work",
    ["print('a line')", "print('a line', flush=True)", "[print('a line') for _ in range(100_000)]",
     "rich.console.Console().print('a line')"],
)  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stdout_that_has_seen_enough_is_no_failure(work, unbuffered):
    done = run_without_reader(work, unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["print('a line', flush=True)", "rich.console.Console().print('a line')"])
def test_other_work_that_a_lost_reader_stops_has_failed(line, tmp_path):
    done = run_without_reader(f"{line}; open({str(tmp_path / 'done')!r}, 'w')", only_shows=False)
    assert done.returncode == 1
    assert done.stderr == "error: stopped midway: its output is not read any more\n"
    assert not (tmp_path / "done").exists()


def test_an_error_keeps_its_code_when_nobody_reads_either():
    assert run_without_reader("print('a line'); raise RunError('disk full')").returncode == 1
    both = run_without_reader("raise RunError('disk full')", stderr=subprocess.STDOUT)
    assert both.returncode == 1


ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_python(work: str, *words: str | bytes, **more) -> subprocess.CompletedProcess[bytes]:
    code = "import os, sys\nfrom bico_ds.common.command_line import Command\n"
    code += "from bico_ds.common.errors import UserError\n"
    code += f"def work(options):\n    {work}\n"
    code += "add = lambda parser: parser.add_argument('words', nargs='*')\n"
    code += "Command(description='', add_options=add, run=work).start()"
    environment = {**os.environ, **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment, timeout=60, check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # fmt: skip


@pytest.mark.parametrize("environment", [ASCII_ONLY, {"PYTHONIOENCODING": "ascii"}], ids=["locale", "python"])
def test_a_terminal_without_our_characters_ends_no_command(environment):
    work = r"print('a \u2026 \u201cb\u201d \xe9 \U0001f600'); raise UserError('\xe9 \u2026')"
    done = run_python(work, env=environment)
    assert done.returncode == 2
    assert done.stdout == rb"a \u2026 \u201cb\u201d \xe9 \U0001f600" + b"\n"
    assert done.stderr == rb"error: \xe9 \u2026" + b"\n"


@pytest.mark.parametrize("environment", [{}, ASCII_ONLY], ids=["utf-8", "ascii"])
def test_a_word_that_is_no_text_is_wrong_usage(environment):
    done = run_python("print(options.words)", b"caf\xe9", env={"LC_ALL": "C.UTF-8", **environment})
    assert (done.returncode, done.stdout) == (2, b"")
    assert rb"'caf\udce9' is no text in " in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_full_disk_under_stdout_is_one_error(unbuffered, lines):
    with open("/dev/full", "wb") as full:
        done = run_python(
            f"[print('a line') for _ in range({lines})]", env={"PYTHONUNBUFFERED": unbuffered}, stdout=full
        )
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


def test_a_closed_stdout_ends_no_command():
    done = run_python(
        "print(sys.stdout.isatty(), file=sys.stderr)", stdout=None, preexec_fn=lambda: os.close(1)
    )
    assert (done.returncode, done.stderr) == (0, b"False\n")


def test_an_error_commands_no_terminal(capsys):
    assert failing(UserError("a\x1b[2Jb\x07\n\tc"))([]) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\\x07\n\tc\n"
