"""What a stranger wrote into names, paths and options stays a word of the batch script: for sbatch, and for bash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bico_ds.cluster.batch_words import sbatch_line, sbatch_line_of
from bico_ds.cluster.job import Job, Resources, Settings
from bico_ds.cluster.submission import preview
from bico_ds.commands.slurm import submit as command
from bico_ds.common.command_line import exit_code
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.paths import LocalPath
from tests.cluster.test_batch_script import run_script

RESOURCES: dict[str, Any] = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "time": "10:00"}
# What SLURM reads, what bash reads, and what none of them must run.
NASTY = "a b'c\"d $(touch ran) `touch ran` #e ; touch ran & packjob {HetJob} ~ *"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny_base")


def make_job(run: Path, recipe, *, settings: dict[str, Any] | None = None, **asked: Any) -> Job:
    return Job(
        name=run.name,
        folder=run / "slurm",
        runs={run: recipe},
        resources=Resources(**RESOURCES | asked),
        settings=Settings(**settings or {}),
    )


def words_of_sbatch(line: str) -> list[str]:
    """The words of an #SBATCH line by the rules of `_get_argument` in SLURM's opt.c, letter by letter."""
    rest, words = line.removeprefix("#SBATCH"), []
    for blanked in ("packjob", "hetjob"):
        at = rest.lower().find(blanked)
        rest = rest if at < 0 else rest[:at] + " " * len(blanked) + rest[at + len(blanked) :]
    at = 0
    while True:
        while at < len(rest) and rest[at].isspace():
            at += 1
        if at == len(rest) or rest[at] == "#":
            return words
        word, quote, escaped = "", "", False
        while at < len(rest) and (quote or escaped or not rest[at].isspace()):
            letter = rest[at]
            if escaped:
                word, escaped = word + letter, False
            elif letter == "\\":
                escaped = True
            elif quote and letter == quote:
                quote = ""
            elif not quote and letter in "\"'":
                quote = letter
            elif not quote and letter == "#":
                return [*words, word]
            else:
                word += letter
            at += 1
        assert not quote, "sbatch ends at an unmatched quote"
        words.append(word)


def sbatch_words(script: str) -> list[str]:
    return [
        word for line in script.splitlines() if line.startswith("#SBATCH") for word in words_of_sbatch(line)
    ]


def test_sbatch_reads_every_value_as_it_was_written(tmp_path, recipe, monkeypatch):
    here = tmp_path / f"{NASTY.replace('/', '')} 50%"
    here.mkdir()
    monkeypatch.chdir(here)
    script = preview(
        make_job(
            here / "-run", recipe, partition=NASTY, account="-a", qos="x=y z", constraint="[a|b]&c*2",
            more=["--comment=two words # no comment", "--mem 0", "--exclusive --wckey='it is'"],
        )
    )  # fmt: skip
    words = sbatch_words(script)
    assert {
        f"--partition={NASTY}", "--account=-a", "--qos=x=y z", "--constraint=[a|b]&c*2", "--job-name=-run",
        f"--chdir={here}", f"--output={str(here).replace('%', '%%')}/-run/slurm/job-%j.out",
        "--comment=two words # no comment", "--exclusive", "--wckey=it is",
    } <= set(words)  # fmt: skip
    assert words[words.index("--mem") + 1] == "0"


def test_any_text_is_one_word_for_sbatch():
    letters = [*"ab'\"\\#$`%= ;&|(){}[]*?~!<>,é😀-", "packjob", "hetjob", "Packjob", "HETJOB"]
    generator = np.random.default_rng()
    for _ in range(300):
        text = "".join(generator.choice(letters, size=generator.integers(1, 12)))
        assert words_of_sbatch(sbatch_line("--comment", text)) == [f"--comment={text}"], text


@pytest.mark.parametrize("option", ["exclusive", "", "a\\", "--comment='a", '--comment=a"', "#--x", "-- x"])
def test_what_is_no_option_of_sbatch_is_refused(option):
    with pytest.raises(UserError, match="--sbatch"):
        sbatch_line_of(option)


CONTROL = ["\n", "\r", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\ud800", "\t"]


@pytest.mark.parametrize("character", CONTROL, ids=lambda c: f"U+{ord(c):04X}")
def test_control_characters_are_refused_by_the_name_of_their_option(tmp_path, recipe, character):
    text = f"a{character}touch ran"
    for name in ("partition", "account", "qos", "constraint"):
        with pytest.raises(UserError, match=rf"--{name}: .*U\+{ord(character):04X}"):
            Resources(**RESOURCES | {name: text})
    with pytest.raises(UserError, match="--sbatch"):
        Resources(**RESOURCES, more=[f"--comment={text}"])
    settings = {"container": text, "network_interface": text, "python": LocalPath(text),
                "native_ops": LocalPath(text), "bind": [LocalPath(text)]}  # fmt: skip
    for name, value in settings.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: "):
            Settings(**{name: value})
    with pytest.raises(UserError, match="output_dir"):
        make_job(tmp_path / text, recipe)


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint"])
def test_an_option_of_slurm_without_a_value_is_refused(name):
    with pytest.raises(UserError, match=f"--{name}: must not be empty"):
        Resources(**RESOURCES | {name: " "})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-dir", "a\ntouch ran"], "--output-dir"),
        (["--set", 'output_dir="a\\ntouch ran"'], "output_dir"),
        (["--partition", "gpu\ntouch ran"], "--partition"),
        (["--output-dir", "a\\b"], "backslash"),
        (["--output-dir", "$LITERAL/a"], "would expand the $"),
        (["--sbatch=exclusive"], "--sbatch 'exclusive'"),
    ],
)
def test_the_command_refuses_them_and_writes_nothing(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setenv("LITERAL", "a$HOME")
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "tiny_base", "--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1"]
    assert exit_code(lambda: command.main([*words, "--time", "10", *arguments])) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_apptainer_cannot_bind_is_refused_where_there_is_a_container(tmp_path, recipe):
    make_job(tmp_path / "a,b", recipe)
    with pytest.raises(UserError, match="--container: apptainer cannot bind"):
        make_job(tmp_path / "a,b", recipe, settings={"container": "x.sif"})


STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
if "bico_ds.commands.train" in sys.argv:
    run = sys.argv[sys.argv.index("--output-dir") + 1]
    json.dump({{"state": "done", "step": 1, "reason": "", "run_id": "new"}}, open(run + "/state.json", "w"))
if sys.argv[0].endswith("scontrol"):
    print("n1")
if sys.argv[0].endswith("srun"):
    open([word for word in sys.argv if word.startswith("--output=")][0][9:].replace("%%", "%"), "a").close()
"""


def test_bash_runs_the_script_with_every_word_whole_and_runs_none_of_them(tmp_path, recipe, monkeypatch):
    """With stand-ins for the commands, which note their words."""
    here = tmp_path / f"{NASTY} 50%"
    commands = tmp_path / "commands"
    for folder in (here, commands):
        folder.mkdir()
    monkeypatch.chdir(here)
    for name in ("srun", "scontrol", "apptainer"):
        (commands / name).write_text(STAND_IN)
        (commands / name).chmod(0o755)
    run, container = here / "-run %j", f"-{NASTY}.sif"
    settings = {"container": container, "network_interface": NASTY, "python": LocalPath(f"${{AT}}/{NASTY}"),
                "bind": [LocalPath(f"${{AT}}/{NASTY}")]}  # fmt: skip
    job = make_job(run, recipe, settings=settings, partition=NASTY, more=[f"--comment={NASTY!r}"])
    run.mkdir()
    done = subprocess.run(
        ["bash", "-c", preview(job)], cwd=here, timeout=60, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "AT": "/at",
                          "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"},
    )  # fmt: skip
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls if call[0] == "srun"] == ["srun", "srun"], done.stdout
    for words in calls:
        if words[0] != "scontrol":
            bound = words[words.index("--bind") + 1]
            assert bound.endswith(f",{run},/at/{NASTY}")
            assert words[words.index("--bind") + 2 :][:2] == [f"./{container}", f"/at/{NASTY}"]
    train = next(words for words in calls if "bico_ds.commands.train" in words)
    assert f"--output={str(run).replace('%', '%%')}/logs/train-9-%N.log" in train
    assert train[train.index("--output-dir") + 1] == str(run)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("run", ["a\\b", "a\nb"])
def test_by_hand_a_folder_that_slurm_cannot_write_into_is_refused(tmp_path, run):
    code, output, steps = run_script(tmp_path, "0 |", RUN=str(tmp_path / run))
    assert (code, steps) == (2, [])
    assert "RUN: SLURM cannot write" in output
