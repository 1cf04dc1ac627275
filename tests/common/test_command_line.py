"""The frame of the commands: messages, exit codes, and which rank shows an error."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bico_ds.common import command_line
from bico_ds.common.command_line import Command
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
    assert failing(error)([]) == code
    assert capsys.readouterr().err == (f"error: {error}\n" if str(error) else "")


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
    monkeypatch.setattr(command_line, "_SECONDS_FOR_MESSAGE", 0.3)
    started = time.monotonic()
    assert failing(UserError("seed: none"), rank=lambda: rank)([]) == 2
    assert (time.monotonic() - started > 0.3) is not shown
    assert ("seed: none" in capsys.readouterr().err) is shown


def test_a_reader_that_has_read_enough_is_no_failure_but_a_broken_socket_of_a_rank_is():
    assert failing(BrokenPipeError())([]) == 0
    with pytest.raises(BrokenPipeError):
        failing(BrokenPipeError(), rank=lambda: 0)([])


PRINTS = """
from bico_ds.common.command_line import Command

def work(options):
    for _ in range(100_000):
        print("a line")

Command(description="", add_options=lambda parser: None, run=work).start()
"""


def test_output_into_head_ends_without_a_word():
    script = f"{sys.executable} -c '{PRINTS}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("a line\n0\n", "")
