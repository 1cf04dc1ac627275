"""One rule expands every path, and distinguishes folders from hub names; no other code does."""

from __future__ import annotations

import argparse
import ast
import getpass
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from bico_ds.common.errors import UserError
from bico_ds.config import arguments
from bico_ds.config.load import dump_recipe, load_recipe, recorded_recipe
from bico_ds.config.paths import FolderOrHubName, LocalPath, WrittenPath
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import ModelSpec
from tests import ROOT

SOURCES = [p for folder in ("bico_ds", "launch", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "text",
    [
        "~/x", "~", f"~{getpass.getuser()}/x", "$ROOM/x", "${ROOM}/x", "${ROOM}${NAME}.d/$NAME/x", "${TILDE}",
        "a~b/$ROOM", "plain/x.json", "$ROOM-x/${NAME}_y", "x$", "$/x", "x$./$ROOM$", "./$ROOM_/y",
    ],
)  # fmt: skip
def test_paths_expand_as_in_a_shell(text, monkeypatch, tmp_path):
    for name, value in {"ROOM": "/big/room", "NAME": "n", "ROOM_": "r", "TILDE": "/a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    shell = subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, text=True, check=True)
    assert LocalPath(text).expanded() == shell.stdout
    assert LocalPath(text).here() == Path(shell.stdout)


def test_a_variables_value_may_begin_at_home_and_is_else_taken_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROOM", "~/room")
    monkeypatch.setenv("ODD", "/a$ROOM")
    assert LocalPath("${ROOM}/x").here() == tmp_path / "room" / "x"
    assert LocalPath("${ODD}/x").expanded() == "/a$ROOM/x"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${GONE}/x", "the environment variable GONE is not set on this machine; set it, or"),
        ("a/$GONE", "the environment variable GONE is not set on this machine"),
        ("${EMPTY}/x", "the environment variable EMPTY is empty on this machine"),
        ("${GONE:-/tmp}/x", "'${GONE:-/tmp}' is neither ${NAME} nor $NAME; correct it, or give another path"),
        ("${ROOM/x", "'${ROOM/x' is neither"),
        ("${ROOM", "'${ROOM' is neither"),
        ("a/${}", "'${}' is neither"),
        ("${ROOM-x}/x", "'${ROOM-x}' is neither"),
        ("${ROOM }", "'${ROOM }' is neither"),
        ("${1A}", "'${1A}' is neither"),
        ("$ROOM/$1", "'$1' is neither"),
        ("${", "'${' is neither"),
        ("~nobody-of-this-name/x", "there is no home folder ~nobody-of-this-name on this machine"),
    ],
)
def test_what_cannot_be_expanded_is_an_error_that_begins_with_its_place(monkeypatch, text, problem):
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    for name in ("ROOM", "1", "1A", "ROOM-x", "ROOM "):  # of an odd name, too, as a program can set
        monkeypatch.setenv(name, "/big/room")
    with pytest.raises(UserError) as caught:
        LocalPath(text, where="mine.yaml:3: output_dir").here()
    assert str(caught.value).startswith(f"mine.yaml:3: output_dir: '{text}': {problem}")


@pytest.mark.parametrize(
    ("value", "is_folder"),
    [
        ("meta-llama/Llama-3.1-8B", False),
        ("models/llama-3.1-70b", True),
        ("runs/tiny", True),
        ("runs/tiny/export", True),
        ("./m", True),
        ("../m", True),
        ("/a", True),
        ("~/m", True),
        ("${MODELS}/m", True),
        ("owner/$NAME", True),
        ("export", True),
        ("a/b/c", True),
    ],
)
def test_hub_names_are_told_from_folders(value, is_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELS", "relative")
    monkeypatch.setenv("NAME", "n")
    written = FolderOrHubName(value)
    assert written.is_folder == is_folder
    assert isinstance(written.here(), Path) == is_folder
    assert not written.is_here()


def test_what_exists_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    assert FolderOrHubName("weights/mine").is_here()


def test_a_written_path_cannot_be_opened_by_mistake():
    for kind in (LocalPath, FolderOrHubName):
        with pytest.raises(TypeError):
            Path(kind("~/x"))


EVERY_KEY = """\
extends: tiny_base
output_dir: ${GONE}/run
model:
  path: ${GONE}/model
  tokenizer: ${GONE}/tokenizer
data:
  cache_dir: ${GONE}/cache
  sources:
    - store: ${GONE}/store
    - files:
        - ${GONE}/*.txt
deepspeed:
  config: ${GONE}/zero.json
  overrides:
    zero_optimization:
      offload_param:
        nvme_path: ${GONE}/nvme
evaluation:
  folder: ${GONE}/tests
"""


def written_paths(value: Any) -> list[WrittenPath]:
    """All of a recipe's paths that have a variable."""
    if isinstance(value, WrittenPath):
        return [value] if "$" in value.text else []
    if isinstance(value, BaseModel):
        value = dict(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [path for part in inner for path in written_paths(part)]


def test_every_path_key_keeps_its_text_and_knows_file_and_line(tmp_path, monkeypatch):
    monkeypatch.delenv("GONE", raising=False)
    file = tmp_path / "mine.yaml"
    file.write_text(EVERY_KEY)
    recipe = load_recipe(str(file))
    found = written_paths(recipe)
    assert len(found) == EVERY_KEY.count("GONE")
    lines = EVERY_KEY.splitlines()
    for path in found:
        line_of_file, key, *_ = path.where.split(": ")
        assert line_of_file.startswith(f"{file}:")
        name = [part for part in key.split(".") if not part.isdigit()][-1]
        line = lines[int(line_of_file.rpartition(":")[2]) - 1]
        assert path.text in line and (name in line or name == "files")
    dumped = dump_recipe(recipe)
    assert dumped.count("${GONE}/") == len(found)
    (tmp_path / "again.yaml").write_text(dumped)
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert yaml.safe_load(dumped) == recipe.model_dump(mode="json")


def test_an_override_and_a_recorded_recipe_name_where_they_were_written(monkeypatch):
    monkeypatch.delenv("GONE", raising=False)
    recipe = load_recipe("tiny_base", ["model.path=${GONE}/m"])
    with pytest.raises(UserError, match=r"^--set model\.path=\$\{GONE\}/m: model\.path: '\$\{GONE\}/m': "):
        recipe.model.path.here()
    recorded = recorded_recipe(recipe.model_dump(mode="json"), Path("runs/x/manifest.json"))
    assert recorded == recipe
    with pytest.raises(UserError, match=r"^runs/x/manifest\.json: model\.path: "):
        recorded.model.path.here()
    with pytest.raises(UserError, match=r"^path: '\$\{GONE\}/m': "):
        ModelSpec(path="${GONE}/m").path.here()


def test_extends_takes_a_path_with_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("ROOM", str(tmp_path))
    (tmp_path / "base.yaml").write_text("extends: tiny_base\nseed: 77\n")
    (tmp_path / "mine.yaml").write_text("extends: ${ROOM}/base.yaml\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).seed == 77
    monkeypatch.delenv("ROOM")
    with pytest.raises(UserError, match=r"mine\.yaml:1: extends: .*variable ROOM is not set"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("value", ["''", "3", "[a]"])
def test_what_is_no_text_is_no_path(value):
    with pytest.raises(UserError, match=r"output_dir: .*(string|character)"):
        load_recipe("tiny_base", [f"output_dir={value}"])


@pytest.mark.parametrize("kind", [arguments.local_path, arguments.path_text, arguments.folder_or_hub_name])
def test_arguments_follow_the_same_rule_and_name_the_option(kind, monkeypatch, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=kind)
    monkeypatch.setenv("ROOM", str(tmp_path))
    value = parser.parse_args(["--place", "${ROOM}/x"]).place
    assert (value.here() if kind is arguments.folder_or_hub_name else Path(value)) == tmp_path / "x"
    monkeypatch.delenv("ROOM")
    for text, problem in {
        "${ROOM}/x": "'${ROOM}/x': the environment variable ROOM is not",
        "": "empty",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--place", text])
        message = capsys.readouterr().err
        assert ended.value.code == 2 and "argument --place: " in message and problem in message


def test_a_path_of_another_machine_is_refused_here_only_where_it_has_no_meaning_anywhere(monkeypatch, capsys):
    monkeypatch.delenv("GONE", raising=False)
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=arguments.written_path)
    assert parser.parse_args(["--place", "~/${GONE}/x"]).place.text == "~/${GONE}/x"
    for text in ("${GONE/x", "${GONE:-x}", "$1/x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--place", text])
        assert f"argument --place: '{text}': '$" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "~/x y",
        "~root/x y",
        "a~/b",
        "${ROOM}/a",
        "$ROOM/a b/${NAME}.$",
        "plain",
        "it's/~/$(date)`date`\"",
        "~",
        "a${ROOM}b$NAME",
    ],
)
def test_a_shell_reads_a_path_as_we_do(monkeypatch, text):
    for name, value in {"HOME": "/home/me", "ROOM": "/my room", "NAME": "n*"}.items():
        monkeypatch.setenv(name, value)
    shell = f"printf %s {LocalPath(text).in_shell()}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout == LocalPath(text).expanded()


def test_a_shell_ends_where_a_variable_is_not_set(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("ROOM", raising=False) if value is None else monkeypatch.setenv("ROOM", value)
        done = subprocess.run(
            ["bash", "-c", f"x={LocalPath('${ROOM}/a').in_shell()}; echo on"], capture_output=True, text=True
        )
        assert done.returncode and done.stdout == "" and "ROOM" in done.stderr


def test_an_empty_home_is_no_home(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match="HOME is empty"):
        LocalPath("~/m").expanded()


PATH_WORDS = {"path", "paths", "folder", "dir", "file", "files", "store", "tokenizer", "extends", "imports"}


def path_fields(section: type[BaseModel], key: str = "") -> dict[str, Any]:
    """The annotations of the schema's fields whose names are those of paths, by dotted key."""
    found = {}
    for name, field in section.model_fields.items():
        if PATH_WORDS & set(name.split("_")):
            found[f"{key}{name}"] = field.annotation
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= path_fields(part, f"{key}{name}.")
    return found


def parts_of(annotation: Any) -> list[Any]:
    return [annotation, *(inner for part in get_args(annotation) for inner in parts_of(part))]


def test_no_path_key_of_the_schema_is_a_plain_string():
    fields = path_fields(Recipe) | {
        "deepspeed.config": Recipe.model_fields["deepspeed"].annotation.model_fields["config"].annotation
    }
    assert {"model.path", "model.tokenizer", "data.sources.store", "data.sources.files", "output_dir"} <= set(
        fields
    )
    plain = [key for key, kind in fields.items() if str in parts_of(kind)]
    assert plain == []
    for key, kind in fields.items():
        assert any(part in (LocalPath, FolderOrHubName, WrittenPath) for part in parts_of(kind)), key


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_else_expands_paths(path):
    if path == ROOT / "bico_ds" / "config" / "paths.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert not names & {"expanduser", "expandvars"}


PATH_TYPES = {"local_path", "path_text", "written_path", "folder_or_hub_name", "picture"}
PATH_ARGUMENTS = {
    "--recipe", "--output-dir", "--output", "--resume", "--model", "--base", "--tokenizer", "--data", "--parents",
    "--couplets", "--pairs", "--retention", "--png", "--inspect", "--container", "--bind", "--python",
    "--native-ops", "--runs", "--folder", "--trl", "recipe", "run", "runs", "paths", "checkpoint", "output", "file",
    "folder", "inputs",
}  # fmt: skip


def arguments_of(path: Path) -> list[tuple[str, str | None, str]]:
    """Name, type and metavar of every argument that a command adds."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = next((a.value for a in node.args if isinstance(a, ast.Constant)), "")
        kind = given.get("type")
        found.append(
            (str(name), getattr(kind, "id", None), ast.unparse(given.get("metavar", ast.Constant(""))))
        )
    return found


COMMANDS = [p for p in SOURCES if p.parts[len(ROOT.parts)] != "bico_ds" and arguments_of(p)]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_argument_goes_through_the_rule(path):
    for name, kind, metavar in arguments_of(path):
        is_path = name in PATH_ARGUMENTS or any(
            word in metavar for word in ("PATH'", "DIR", "FOLDER", "STORE")
        )
        if is_path and metavar != "'KEY.PATH=VALUE'":
            assert kind in PATH_TYPES, f"{name} has type={kind}"
        assert kind not in ("Path", "str"), f"{name}: use a type of bico_ds/config/arguments.py"
