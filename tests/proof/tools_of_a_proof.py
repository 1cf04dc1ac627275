"""Small tools in the place of those in tools/bench/: parts that are right, wrong, crash or hang within a second."""

from __future__ import annotations

from pathlib import Path

from bico_ds.proof.parts import Part

# Each call leaves a line in a file beside the tool, by which tests count them.
BEGIN = """
import json, os, subprocess, sys, time
open(__file__ + ".calls", "a").write("called\\n")
def end(code=0, **found):
    print(json.dumps({"rows": [], **found}), flush=True)
    sys.exit(code)
"""
RIGHT = BEGIN + "end(notes=['a note'])"
WRONG = BEGIN + "end(1, wrong=['aten-cuda is wrong by 0.5'])"
SAYS_ONLY_THAT_IT_IS_WRONG = BEGIN + "end(0, wrong=['aten-cuda is wrong by 0.5'])"
CRASHES = BEGIN + "sys.exit('the driver is gone')"
NOT_MEASURED = BEGIN + "end(not_measured='no nvcc')"
WITHOUT_FINDINGS = BEGIN + "print('nothing to say')"
# Of its children one leaves its group, and one ignores signals; both outlive it if they are let.
HANGS = (
    BEGIN
    + """
print("measured: 42 TFLOP/s", flush=True)
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
children = [subprocess.Popen([sys.executable, "-c", sleep], start_new_session=own) for own in (True, False)]
open(__file__ + ".pids", "w").write(" ".join(str(c.pid) for c in children) + f" {os.getpid()}")
time.sleep(600)
"""
)


def part(folder: Path, name: str, source: str, *, seconds: float = 60) -> Part:
    """A part of the proof whose tool has this source; its findings count as those of the part `name`."""
    folder.mkdir(exist_ok=True)
    tool = folder / f"{name}.py"
    tool.write_text(source)
    return Part(name=name, question=f"Is {name} right?", tool=str(tool), seconds=seconds)


def calls(folder: Path, name: str) -> int:
    """How often the tool of a part was called."""
    file = folder / f"{name}.py.calls"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def pids(folder: Path, name: str) -> list[int]:
    """The processes of a part that hangs, once it has started all."""
    file = folder / f"{name}.py.pids"
    return [int(word) for word in file.read_text().split()] if file.is_file() else []
