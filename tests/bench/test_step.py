"""The command line of tools/bench/step.py."""

from __future__ import annotations

import pytest

from tools.bench import step


@pytest.mark.parametrize("option", ["--repeats", "--bins"])
def test_a_count_below_one_is_refused_before_anything_runs(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        step.main([option, "0"])
    assert stopped.value.code == 2
    assert f"argument {option}: must be at least 1" in capsys.readouterr().err
