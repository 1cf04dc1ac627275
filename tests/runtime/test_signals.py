"""A signal asks once, the second ends; in start-up it interrupts. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from bico_ds.runtime.signals import Interrupted, StopFlag

PROGRAM = """
import sys, time
from bico_ds.runtime.signals import StopFlag
stop = StopFlag()
stop.install(["SIGTERM", "SIGINT", "SIGUSR1"])
{extra}
print("ready", flush=True)
deadline = time.monotonic() + 30
while not stop and time.monotonic() < deadline:
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(200)
"""


def program(extra: str = "", *, hang_up: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    """`hang_up`: what SIGHUP does to it at first, whether or not these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, hang_up)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(extra=extra)], stdout=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_sets_the_flag_and_a_second_of_its_kind_ends_at_once(name):
    process, number = program(), getattr(signal, name)
    process.send_signal(number)
    assert process.stdout.readline() == f"{name}\n"
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number


@pytest.mark.parametrize(
    ("name", "echo"),
    [
        pytest.param("SIGINT", "SIGTERM", id="of DeepSpeed's launcher after Ctrl-C"),
        pytest.param("SIGHUP", "SIGHUP", id="of a terminal that closes, which may say so twice"),
    ],
)
def test_an_echo_is_the_same_wish_and_not_a_second_one(name, echo):
    process = program()
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == f"{name}\n"
    process.send_signal(getattr(signal, echo))
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_what_nohup_started_goes_on_when_its_terminal_closes():
    process = program(hang_up=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.kill()
    process.wait()


def test_a_time_limit_sets_the_flag():
    process = program("stop.limit(0.005)")
    assert process.stdout.readline() == "time limit of 0.005 minutes\n"
    process.kill()
    process.wait()


def test_after_the_work_is_done_signals_change_nothing():
    process = program("stop.set('work'); stop.finish()")
    assert process.stdout.readline() == "work\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_in_start_up_a_signal_interrupts():
    stop = StopFlag()
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)}
    stop.install(["SIGUSR1"])
    try:
        with pytest.raises(Interrupted, match="SIGUSR1"), stop.interrupting():
            os.kill(os.getpid(), signal.SIGUSR1)  # Python runs the handler before this line is over
        assert stop
        with pytest.raises(Interrupted), stop.interrupting():
            pytest.fail("a stop asked for before the block was not seen")
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
