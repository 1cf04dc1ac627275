"""Lines of the user's own in a batch script, as module loads and variables of NCCL: on the first node, before all else."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bico_ds.cluster.batch_words import refuse_control_characters
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import text_without_secrets

_MOST_BYTES = 1 << 16
# What bash puts in when the line runs: the output of a command, or a variable.
_PUT_IN = re.compile(r"\$\((?P<command>[^()]*)\)|`(?P<quoted>[^`]*)`|\$\{\w+:?[-?](?P<default>)\}", re.ASCII)


@dataclass(frozen=True)
class Prologue:
    """The lines of `file`, as they were read."""

    file: str
    text: str

    def in_script(self) -> str:
        """The part of a batch script that runs them. A line that fails, or ends the shell, ends the job and is named.

        What fails within a function (no `set -E`) or a sourced file fails nobody, for `module` and the files of
        /etc/profile.d do so on their way: what they return counts. The rest of the script is in its own folder again,
        whatever the lines did, and leaves an EXIT trap of theirs.
        """
        name = shlex.quote(f"prologue ({self.file})")
        return f"""\
# ---- Prologue: {self.file}, as it was when this script was written
prologue_failed() {{
    trap - ERR EXIT
    echo "[$(date '+%F %T')]" {name}"$1; nothing was trained"
    exit 1
}}
prologue_line_failed() {{
    [ "$3" -gt 1 ] || prologue_failed ", line $(($2 - prologue_line)): exit code $1"
}}
trap 'prologue_line_failed $? $LINENO ${{#BASH_SOURCE[@]}}' ERR
trap 'prologue_failed ": the shell was to end (exit code $?)"' EXIT
prologue_folder=$PWD
prologue_line=$LINENO
{self.text}
trap - ERR
case $(trap -p EXIT) in *prologue_failed*) trap - EXIT ;; esac
cd "$prologue_folder" || exit 1
# ---- End of the prologue
"""


def read_prologue(path: Path) -> Prologue:
    """The lines of a file for a batch script. Raises `UserError` for what bash would not read as whole lines, `#SBATCH`
    lines, which SLURM would not see there, and secrets, which the script would show."""
    where = f"--prologue {path}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read: {error.strerror}; name a file with lines for bash"
        ) from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{where}: {len(content):,} bytes; a prologue has at most {_MOST_BYTES:,}")
    try:
        text = content.decode("utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    refuse_control_characters(str(path), "--prologue")
    _check_lines(text, where)
    _check_syntax(text, where)
    return Prologue(str(path), text)


def _check_lines(text: str, where: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        refuse_control_characters(line.replace("\t", " "), f"{where}:{number}")
        if line.startswith("#SBATCH"):
            raise UserError(
                f"{where}:{number}: SLURM reads no #SBATCH line after the first command; give --sbatch="
                f"{line.removeprefix('#SBATCH').strip() or '--OPTION'}"
            )
        if _shows_a_secret(line):
            raise UserError(
                f"{where}:{number}: the batch script would show a secret; set it in the environment of this command, which "
                "sbatch hands to the job"
            )


def _shows_a_secret(line: str) -> bool:
    """Whether a secret is written in the line, not only read from elsewhere, as in `HF_TOKEN=$(cat FILE)`."""
    commands = [found["command"] or found["quoted"] or "" for found in _PUT_IN.finditer(line)]
    return any(text_without_secrets(text) != text for text in (_PUT_IN.sub("$VALUE", line), *commands))


def _check_syntax(text: str, where: str) -> None:
    """By bash itself, which warns of a here-document without its end and goes on: the rest of the script would be in it.

    Without this shell's variables: bash warns of a locale that is not installed, and reads the file in BASH_ENV, too.
    """
    if text.endswith("\\"):
        raise UserError(
            f"{where}: the last line ends in a backslash, which would join it with the script's next"
        )
    if (bash := shutil.which("bash")) is None:
        return
    done = subprocess.run(
        [bash, "-n"], input=f"{text}\n".encode(), env={"LC_ALL": "C"}, capture_output=True, check=False
    )
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or done.stderr:
        reason = said.splitlines()[0].removeprefix("bash: ") if said else "a syntax error"
        raise UserError(f"{where}: bash cannot read it: {reason}")
