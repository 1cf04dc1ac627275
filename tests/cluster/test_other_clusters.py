"""What other clusters need of a job: a prologue, pyxis, nodes without a network, code that does not change while it waits.

The scripts run in bash, with stand-ins for SLURM's commands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.cluster.code import change_since, code_of_this_program, copy_code, fingerprint_of
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
case ${options[*]} in *--container-image*) export MASTER_PORT=of-image PYTHONPATH=/of/image NCCL_OF_PROLOGUE=of-image ;; esac
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
    env > "$CALLS.all"
    printenv HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE NCCL_OF_PROLOGUE > "$CALLS.environment"
    echo "$PYTHONPATH" > "$CALLS.path"
    echo '{{"state": "done", "step": 7, "reason": "", "run_id": "new"}}' > "$RUN_FOLDER/state.json"
    exit 0 ;;
esac
exec {sys.executable} "$@"
"""


ASKED = shlex.split("--recipe tiny_base --nodes 1 --gpus-per-node 0 --ranks-per-node 1 --time 60")


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
    tools = folder / "tools"  # this machine may have a SLURM
    tools.mkdir(exist_ok=True)
    for name in ("bash", "git"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", f"{folder / 'none'}:{tools}")
    code = command.main([*ASKED, "--output-dir", str(folder / "run"), *words])
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


def test_what_a_sourced_file_does_on_its_way_fails_nobody_and_what_it_returns_counts(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "init.sh").write_text("false\nexport NCCL_OF_PROLOGUE=x\n")
    (tmp_path / "bad.sh").write_text("true\nfalse\n")
    _, script, _ = with_prologue(monkeypatch, tmp_path, capsys, ". ./init.sh\n")
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 0, output
    assert (tmp_path / "calls.environment").read_text() == "x\n"
    _, script, _ = with_prologue(monkeypatch, tmp_path, capsys, "true\n. ./bad.sh\n")
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 1 and "prologue (lines.sh), line 2: exit code 1" in output


def test_a_prologue_leaves_the_script_its_folder_and_its_judgement_of_exit_codes(
    monkeypatch, tmp_path, capsys
):
    lines = "set -e\ncd /\ntrap 'echo the scratch is gone' EXIT\n"
    _, script, _ = with_prologue(monkeypatch, tmp_path, capsys, lines)
    monkeypatch.setattr(sys.modules[__name__], "PYTHON", PYTHON.replace('"done"', '"preempted"'))
    exit_code, output = run_script(tmp_path, script)
    assert exit_code == 75 and output.count("the scratch is gone") == 1, output
    assert f"PWD={tmp_path}\n" in (tmp_path / "calls.all").read_text()
    assert "restarts are left" in output  # `set -e` would have ended the script before


def test_every_step_gets_what_the_script_exports_whatever_the_job_was_submitted_with(
    monkeypatch, tmp_path, capsys
):
    python = ("--python", str(commands_in(tmp_path) / "python"))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, *python)
    exit_code, output = run_script(tmp_path, script, SLURM_EXPORT_ENV="NONE")
    assert exit_code == 0, output
    assert "SLURM_EXPORT_ENV=ALL\n" in (tmp_path / "calls.all").read_text()


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=$(cat ~/.hf_token)", 'export HF_TOKEN="$(< "$HOME/.token")"', "export HF_TOKEN=`cat token`",
     'export HF_TOKEN="${HF_TOKEN:-}"', "export HF_TOKEN=$HF_TOKEN"],
)  # fmt: skip
def test_a_prologue_may_read_a_secret_but_hold_none(tmp_path, line):
    file = tmp_path / "lines.sh"
    file.write_text(f"{line}\n")
    assert read_prologue(file).text == line
    file.write_text("export HF_TOKEN=$(echo hf_abcdefghijklmnopqrstuvwxyz)\n")
    with pytest.raises(UserError, match="secret"):
        read_prologue(file)


def test_a_prologue_is_read_where_this_shell_has_no_locale_and_a_start_file(monkeypatch, tmp_path):
    (tmp_path / "start.sh").write_text("echo started >&2\nif\n")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "start.sh"))
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    (tmp_path / "lines.sh").write_text("echo é\n")
    assert read_prologue(tmp_path / "lines.sh").text == "echo é"


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
    exit_code, output = run_script(
        tmp_path, script, SLURM_RESTART_COUNT="1", SRUN_RETURNS="143", NCCL_OF_PROLOGUE="ours"
    )
    assert exit_code == 0, output
    calls = (tmp_path / "calls.srun").read_text().splitlines()
    idle, steps = calls[:8], calls[8:]
    assert all("--container-image" not in call for call in idle)
    assert len(steps) == 6  # begin, native operations, pre-flight, training, suspect, end
    inside = (tmp_path / "calls.all").read_text().splitlines()
    assert "NCCL_OF_PROLOGUE=ours" in inside and "MASTER_PORT=of-image" not in inside
    assert (tmp_path / "calls.path").read_text().startswith(str(ROOT))
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


def test_pyxis_gets_an_image_file_by_its_whole_path_and_no_mapped_folders(monkeypatch, tmp_path, capsys):
    (tmp_path / "image.sqsh").touch()
    words = ("--container", "image.sqsh", "--container-runtime", "pyxis")
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, *words)
    assert f"CONTAINER={tmp_path}/image.sqsh\n" in script.read_text()
    code, _, error = submitted(monkeypatch, tmp_path, capsys, *words, "--bind", "/a:/b")
    assert code == 2 and "--bind /a:/b: of pyxis" in error


def test_a_run_of_an_array_is_bound_alone(monkeypatch, tmp_path, capsys):
    (tmp_path / "image.sif").touch()
    words = ("--container", "image.sif", "--seeds", *map(str, range(40)))
    submitted(monkeypatch, tmp_path, capsys, *words)
    (script,) = (tmp_path / "run" / "slurm").glob("job-*.sbatch")
    (bound,) = re.findall("^BIND=.*", script.read_text(), re.MULTILINE)
    assert bound == f'BIND={ROOT},{tmp_path},"$RUN"'


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
     (("config.json", "model.safetensors", "vocab.json", "merges.txt"), None),
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
    monkeypatch.delenv("HF_HUB_OFFLINE")
    by_the_model = load_recipe("tiny_base", ["model.path=owner/name"])
    assert [problem.partition(": ")[2] for problem in missing_inputs(by_the_model, offline=True)] == [
        problem.partition(": ")[2]
        for problem in sorted(found, key=lambda problem: "tokenizer" not in problem)
    ]
    if said is None:
        assert found == []
        return
    assert re.search(said, found[0])
    assert "hf download owner/name" in found[0]


def test_a_shard_that_the_cache_lacks_is_named(monkeypatch, tmp_path):
    from bico_ds.cluster.preflight.inputs import missing_inputs
    from bico_ds.config.load import load_recipe

    cached(monkeypatch, tmp_path, "config.json", "tokenizer.json", "a-1-of-2.safetensors")
    index = next(tmp_path.glob("*/snapshots/*")) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a-1-of-2.safetensors", "y": "a-2-of-2.safetensors"}}))
    (problem,) = missing_inputs(load_recipe("tiny_base", ["model.path=owner/name"]), offline=True)
    assert "1 of 3 files" in problem and "first 'a-2-of-2.safetensors'" in problem


def test_an_offline_job_finds_the_cache_of_the_submission_and_a_container_sees_it(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "image.sif").touch()
    home = tmp_path / "hf home"
    (home / "hub").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, "--offline", "--container", "image.sif")
    text = script.read_text()
    assert (
        f"export HF_HOME='{home}'\n" in text and "HF_HUB_CACHE=" not in text.partition("# ---- The rest")[0]
    )
    assert f"'{home}'" in re.findall("^BIND=.*", text, re.MULTILINE)[0]
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(elsewhere))
    _, script, _ = submitted(monkeypatch, tmp_path, capsys, "--offline")
    assert f"export HF_HUB_CACHE={elsewhere}\n" in script.read_text()
    _, script, _ = submitted(monkeypatch, tmp_path, capsys)
    assert "export HF_HOME" not in script.read_text()


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


def test_a_copy_knows_its_commit_whatever_repository_lies_around_it(monkeypatch, tmp_path, capsys):
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    given = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a",
             "GIT_COMMITTER_EMAIL": "a"}  # fmt: skip
    subprocess.run(
        ["git", "commit", "--quiet", "--allow-empty", "-m", "another project's"],
        cwd=tmp_path,
        env=os.environ | given,
        check=True,
    )
    submitted(monkeypatch, tmp_path, capsys, "--copy-code")
    copy = tmp_path / "run" / "slurm" / "code-1"
    asked = [
        sys.executable,
        "-P",
        "-c",
        "from bico_ds.runtime.provenance import git_commit; print(git_commit())",
    ]

    def commit():
        done = subprocess.run(
            asked, env=os.environ | {"PYTHONPATH": str(copy)}, cwd=tmp_path, capture_output=True, text=True, check=True
        )  # fmt: skip
        return done.stdout.strip()

    assert commit() == str(code_of_this_program().in_words()["commit"])
    (copy / "copied-commit").unlink(missing_ok=True)
    assert commit() == "None"


def test_a_lock_of_an_editor_is_no_part_of_a_copy_and_a_colon_refuses_one(monkeypatch, tmp_path, capsys):
    checkout = tmp_path / "checkout"
    (checkout / "bico_ds").mkdir(parents=True)
    (checkout / "bico_ds" / "a.py").write_text("a = 1\n")
    (checkout / "bico_ds" / ".#a.py").symlink_to("me@here.1234")
    monkeypatch.setattr("bico_ds.cluster.code.CHECKOUT", checkout)
    copy_code(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy" / "bico_ds").iterdir()] == ["a.py"]
    code, _, error = submitted(
        monkeypatch, tmp_path, capsys, "--copy-code", "--output-dir", str(tmp_path / "a:b")
    )
    assert code == 2 and "--copy-code: Python finds no code below" in error
    assert not (tmp_path / "a:b").exists()


def test_what_sbatch_warns_of_is_shown_and_its_silence_is_no_traceback(monkeypatch, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    sbatch = tmp_path / "none" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: your job goes to debug' >&2\necho 7\n")
    sbatch.chmod(0o755)
    code, _, error = submitted(monkeypatch, tmp_path, capsys)
    assert code == 0 and "sbatch: your job goes to debug" in error
    sbatch.write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    monkeypatch.setattr("bico_ds.cluster.submission._SECONDS_FOR_SBATCH", 0.2)
    code, _, error = submitted(monkeypatch, tmp_path, capsys)
    assert code == 2 and "may have taken the job: look with squeue" in error


def test_a_preview_writes_nothing_and_names_the_copy_that_would_be_made(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([*ASKED, "--copy-code", "--dry-run"]) == 0
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
