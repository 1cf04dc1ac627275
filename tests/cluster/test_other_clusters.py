"""What other clusters need of a job: a prologue, pyxis, nodes without a network, code that does not change while it waits.

The scripts run in bash, with stand-ins for SLURM's commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.cluster.code import change_since, code_of_this_program, fingerprint_of
from bico_ds.cluster.prologue import read_prologue
from bico_ds.commands.slurm import submit as command
from bico_ds.common.errors import UserError
from tests import ROOT

# A step: its options go to a file, and what comes after them is run.
SRUN = """#!/bin/bash
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
printf '%s\\n' "${options[*]}" >> "$CALLS.srun"
[ "${1:-}" = true ] && exit 0
for word in "${options[@]}"; do case $word in --output=*) exec >> "${word#--output=}" ;; esac; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1
"$@"
code=$?
[[ ${options[*]} == *--nodelist* ]] && exit ${SRUN_RETURNS:-$code} # 143, as steps that ended well were seen to end
exit $code
"""
PYTHON = f"""#!/bin/bash
case "$*" in
*bico_ds.commands.slurm.native_ops*) exit 0 ;;
*bico_ds.commands.preflight*) exit 0 ;;
*bico_ds.commands.train*)
    printenv HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE NCCL_OF_PROLOGUE > "$CALLS.environment"
    echo "$PYTHONPATH" > "$CALLS.path"
    echo '{{"state": "done", "step": 7, "reason": "", "run_id": "new"}}' > "$RUN_FOLDER/state.json"
    exit 0 ;;
esac
exec {sys.executable} "$@"
"""


def commands_in(folder: Path) -> Path:
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n1\n"), ("python", PYTHON)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return commands


def submitted(monkeypatch, folder, capsys, *words):
    """(exit code, the script or None, stderr) of `submit` with these words, where there is no sbatch."""
    monkeypatch.chdir(folder)
    commands = folder / "none"  # no sbatch, whatever this machine has
    commands.mkdir(exist_ok=True)
    for name in ("bash", "git"):
        if (found := shutil.which(name)) is not None and not (commands / name).exists():
            (commands / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(commands))
    given = [
        "--recipe",
        "tiny_base",
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--ranks-per-node",
        "1",
        "--time",
        "60",
    ]
    code = command.main([*given, "--output-dir", str(folder / "run"), *words])
    scripts = sorted((folder / "run" / "slurm").glob("job-*.sbatch"))
    return code, scripts[-1] if scripts else None, capsys.readouterr().err


def run_script(folder: Path, script: Path, **changed):
    """Exit code and output of the script on a node."""
    commands = commands_in(folder)
    environment = os.environ | {
        "PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "RUN_FOLDER": str(folder / "run"),
        "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1",
        "SLURM_SUBMIT_DIR": str(folder), **changed,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(script)], cwd=folder, env=environment, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def with_prologue(monkeypatch, folder, capsys, text, *words):
    (folder / "lines.sh").write_text(text)
    python = ("--python", str(commands_in(folder) / "python"))
    return submitted(monkeypatch, folder, capsys, "--prologue", "lines.sh", *python, *words)


def test_a_prologue_runs_before_all_else_and_its_variables_reach_the_ranks(monkeypatch, tmp_path, capsys):
    lines = (
        "module() { grep -q nothing /dev/null; export NCCL_OF_PROLOGUE=$2; }  # what fails within it fails nobody\n"
        "cat > there.txt <<'END'\nquoted \"text\" $HOME\nEND\n"
        "echo $SURELY_UNSET_VARIABLE\nmodule load cuda/13\n"
    )
    code, script, error = with_prologue(monkeypatch, tmp_path, capsys, lines)
    assert code == 2 and "no `sbatch`" in error and script is not None
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 0, output
    assert (tmp_path / "calls.environment").read_text() == "cuda/13\n"
    assert (tmp_path / "there.txt").read_text() == 'quoted "text" $HOME\n'


@pytest.mark.parametrize(
    ("lines", "line", "why"),
    [("true\n\nfalse\ntrue\n", 3, "exit code 1"), ("x=1\nno-such-module load x\n", 2, "exit code 127"),
     ("exit 0\n", None, "the shell was to end (exit code 0)")],
)  # fmt: skip
def test_a_line_of_the_prologue_that_fails_ends_the_job_and_is_named(
    monkeypatch, tmp_path, capsys, lines, line, why
):
    _, script, _ = with_prologue(monkeypatch, tmp_path, capsys, lines)
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 1
    where = "" if line is None else f", line {line}"
    assert f"prologue (lines.sh){where}: {why}; nothing was trained" in output
    assert not (tmp_path / "calls.environment").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"#SBATCH --mem=0\n", r"lines\.sh:1: SLURM reads no #SBATCH line .*--sbatch=--mem=0"),
     (b"echo 'open\n", "bash cannot read it"), (b"cat <<END\nx\n", "bash cannot read it.*here-document"),
     (b"if true; then\n", "bash cannot read it"), (b"true \\\n", "ends in a backslash"),
     (b"echo a\r\n", r"lines\.sh:1: .*U\+000D"), (b"x=\xff\n", "not UTF-8"), (b"a" * 70_000, "70,000 bytes"),
     (b"true\nexport HF_TOKEN=hf_abcdefghijklmnopqrst\n", r"lines\.sh:2: .*secret")],
)  # fmt: skip
def test_a_prologue_that_bash_would_read_otherwise_is_refused(tmp_path, content, said):
    file = tmp_path / "lines.sh"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prologue(file)
    assert "abcdefghijk" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_prologue(tmp_path / "none.sh")


def test_pyxis_puts_every_command_of_the_job_into_the_container(monkeypatch, tmp_path, capsys):
    python = ("--python", str(commands_in(tmp_path) / "python"), "--bind", "/data/x y")
    words = ("--container", "nvcr.io#nvidia/pytorch:26.01-py3", "--container-runtime", "pyxis", *python)
    code, script, error = submitted(monkeypatch, tmp_path, capsys, *words)
    assert code == 2 and "no `sbatch`" in error and script is not None
    exit_code, output = run_script(tmp_path, script, SLURM_RESTART_COUNT="1", SRUN_RETURNS="143")
    assert exit_code == 0, output
    calls = (tmp_path / "calls.srun").read_text().splitlines()
    idle, steps = calls[:8], calls[8:]
    assert all("--container-image" not in call for call in idle)
    assert len(steps) == 6  # begin, native operations, pre-flight, training, suspect, end
    mounted = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data/x y:/data/x y"
    for step in steps:
        assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in step
        assert f"--container-mounts={mounted} --container-workdir={tmp_path}" in step
    assert "done after step 7" in output


def test_an_image_file_must_be_there_and_one_of_a_registry_need_not(monkeypatch, tmp_path, capsys):
    for words in (["/none.sqsh", "--container-runtime", "pyxis"], ["docker-like/name"]):
        code, script, error = submitted(monkeypatch, tmp_path, capsys, "--container", *words)
        assert (code, script) == (2, None)
        assert f"--container: '{words[0]}' is not there" in error


def cached(monkeypatch, folder: Path, *files: str) -> None:
    """A hub's cache with a snapshot of `owner/name` that has these files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in files:
        (snapshot / name).write_text("{}")


@pytest.mark.parametrize(
    ("files", "said"),
    [(None, "not in the hub's cache"), (("config.json",), "1 of 2 files are not in the cache .*model.safetensors"),
     (("config.json", "model.safetensors"), "its tokenizer is not in the cache"),
     (("config.json", "model.safetensors", "tokenizer.json"), None)],
)  # fmt: skip
def test_offline_nodes_need_what_has_a_hub_name_in_the_cache(monkeypatch, tmp_path, capsys, files, said):
    from bico_ds.cluster.preflight.inputs import missing_inputs
    from bico_ds.config.load import load_recipe

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if files is not None:
        cached(monkeypatch, tmp_path / "hub", *files)
    recipe = load_recipe("tiny_base", ["model.path=owner/name", "model.tokenizer=owner/name"])
    assert list(missing_inputs(recipe)) == []
    found = list(missing_inputs(recipe, offline=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(missing_inputs(recipe)) == found
    if said is None:
        assert found == []
        return
    assert re.search(said, found[0])
    assert "hf download owner/name" in found[0]


def test_offline_reaches_the_ranks(monkeypatch, tmp_path, capsys):
    python = ("--python", str(commands_in(tmp_path) / "python"))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, "--offline", *python)
    exit_code, output = run_script(tmp_path, script, NCCL_OF_PROLOGUE="x")
    assert exit_code == 0, output
    assert (tmp_path / "calls.environment").read_text().split() == ["1", "1", "1", "x"]


def test_each_start_says_where_the_code_is_not_that_of_the_submission(monkeypatch, tmp_path, capsys):
    python = ("--python", str(commands_in(tmp_path) / "python"))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, *python)
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 0 and "WARNING" not in output, output
    text = script.read_text()
    assert f"SUBMITTED_CODE={code_of_this_program().fingerprint}" in text
    script.write_text(text.replace(code_of_this_program().fingerprint, "0123-4567"))
    (tmp_path / "run" / "state.json").unlink()
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 0, output
    assert f"WARNING: the code in '{ROOT}' is not that of the submission (then 0123-4567, now " in output


def test_a_copy_of_the_code_is_what_the_job_runs_whatever_happens_to_the_checkout(
    monkeypatch, tmp_path, capsys
):
    python = ("--python", str(commands_in(tmp_path) / "python"))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, "--copy-code", *python)
    copy = tmp_path / "run" / "slurm" / "code-1"
    assert (copy / "bico_ds" / "attention" / "packed.py").read_bytes() == (
        ROOT / "bico_ds/attention/packed.py"
    ).read_bytes()
    assert not list(copy.rglob("__pycache__"))
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 0 and "WARNING" not in output, output
    assert (tmp_path / "calls.path").read_text().split(":")[0].strip() == str(copy)
    asked = "from bico_ds.config import resources; print(resources.CHECKOUT, resources.DS_CONFIGS)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", asked], env=os.environ | {"PYTHONPATH": str(copy)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(copy), str(copy / "ds_configs")]


def test_a_preview_writes_nothing_and_names_the_copy_that_would_be_made(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--recipe",
        "tiny_base",
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--ranks-per-node",
        "1",
        "--time",
        "60",
    ]
    assert command.main([*words, "--copy-code", "--dry-run"]) == 0
    assert f"PROJECT={tmp_path}/runs/tiny_base/slurm/code-1\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_any_change_of_sources_or_configurations_changes_the_fingerprint(tmp_path):
    for name in ("bico_ds", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package, configs = tmp_path / "bico_ds", tmp_path / "ds_configs"
    before = fingerprint_of(package, configs)
    assert before == code_of_this_program().fingerprint
    assert change_since(before) is None
    for file in (package / "native" / "tiles.cpp", configs / "zero3_bf16.json", package / "batch.py"):
        content = file.read_text()
        file.write_text(f"{content} ")
        assert fingerprint_of(package, configs) != before, file
        file.write_text(content)
    (package / "more.py").touch()
    assert fingerprint_of(package, configs) != before


def test_a_submission_records_its_code(monkeypatch, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    sbatch = tmp_path / "none" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    code, _, _ = submitted(monkeypatch, tmp_path, capsys)
    assert code == 0
    line = json.loads((tmp_path / "run" / "slurm" / "jobs.jsonl").read_text())
    assert line["code"] == code_of_this_program().fingerprint and line["version"]
