"""The releases of `make test-lowest` are the lowest that pyproject.toml allows: no more, and no fewer."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests import ROOT

UNUSED = {"ruff", "mypy", "types-PyYAML", "bico_ds"}  # no test of theirs runs there


def test_the_lowest_environment_has_every_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    floors = map(Requirement, [*project["dependencies"], *extras["gguf"], *extras["dev"]])
    allowed = {floor.name: lowest(floor) for floor in floors if floor.name not in UNUSED}
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    built = {pin.name: lowest(pin) for pin in map(Requirement, lines[1:])}
    assert built.keys() == allowed.keys()
    for name, version in built.items():
        floor = allowed[name].release
        assert version.release[: len(floor)] == floor, f"{name}: {version} is built, {allowed[name]} allowed"


def lowest(requirement: Requirement) -> Version:
    (only,) = (part for part in requirement.specifier if part.operator in (">=", "=="))
    return Version(only.version)
