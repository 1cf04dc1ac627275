"""The packing bench: it refuses what it cannot measure in one message, and asks for the memory that it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.bench import packing as bench


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, bench.__file__, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "0"], "argument --sequences: must be at least 1, found 0"),
        (["--sequences", "-5"], "argument --sequences: must be at least 1, found -5"),
        (["--capacity", "0"], "argument --capacity: must be at least 1, found 0"),
        (["--trl-memory", "-1"], "argument --trl-memory: must be more than 0, found -1"),
        (["--trl-memory", "nan"], "argument --trl-memory: must be more than 0, found nan"),
        (["--trl-memory", "x"], "argument --trl-memory: invalid gigabytes value: 'x'"),
        (["--trl-memory", "1e-6"], "--trl-memory: a sequence of 4096 tokens takes 8.3e-05 GB"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_message(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_few_short_sequences_are_measured():
    done = run("--sequences", "3", "--capacity", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert '"rows"' in done.stdout.splitlines()[-1]


def test_the_memory_asked_for_is_that_of_the_sequences_and_not_trl_s_allowance():
    assert bench.needed_bytes(1000, 4096, 40e9) < 1.2e9
    assert bench.needed_bytes(100_000_000, 4096, 5e9) > 5e9


@pytest.mark.parametrize("name", bench.DISTRIBUTIONS)
def test_the_memory_asked_for_covers_every_distribution_and_the_smallest_allowance_one_sequence(name):
    lengths = bench.draw_lengths(name, 2000, 512)
    whole = sum(bench.trl_bytes_of_sequence(length) for length in lengths.tolist())
    assert bench.needed_bytes(2000, 512, 1e12) - bench.PROCESS_BYTES >= whole
    assert len(bench.trl_share(lengths, whole)) == 2000
    assert len(bench.trl_share(lengths, bench.trl_bytes_of_sequence(512))) >= 1
