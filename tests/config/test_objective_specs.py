"""Objectives in the recipe: their identity, what they cost, and further ones by `imports`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe, recorded_recipe
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.table import KINDS, read_spec
from bico_ds.config.section import Section
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.build import build_objectives
from tests import DOUBLING
from tests.config.mistakes import error_of


def test_an_identity_leaves_out_the_probability_and_what_is_the_default():
    assert NtpSpec(probability=0.3, loss_on="all").identity() == {"kind": "ntp", "version": 1}
    spelled_out = {"rate": 0.15, "unit": "token", "mean_span": 3.0, "eligible": "all"}
    assert BicoSpec.model_validate({"mask": spelled_out}).identity() == BicoSpec().identity()
    spans = BicoSpec(mask=MaskSpec(rate=(0.2, 0.6), unit="span"))
    assert spans.identity()["mask"] == {"rate": [0.2, 0.6], "unit": "span"}


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "bico", "mask": {"rate": 0.15}},
        {"kind": "bico", "mask": {"rate": 0.4}},
        {"kind": "bico", "mask": {"rate": 1.0}},
        {"kind": "bico", "mask": {"rate": [0.0, 1.0]}},
        {"kind": "bico", "mask": {"rate": 0.4, "unit": "span"}},
        {"kind": "bico", "mask": {"rate": [0.2, 0.6], "unit": "span", "mean_span": 5}},
        {"kind": "bico", "mask": {"rate": 1.0, "unit": "span"}},
        {"kind": "abi", "mask": {"rate": [0.2, 0.6], "unit": "span", "mean_span": 5}},
        {"kind": "abi", "mask": {"rate": [0.1, 0.9], "unit": "span"}, "spans": "left_to_right"},
        {"kind": "mlm_u"},
        {"kind": "mlm_u", "predict": "next"},
        {"kind": "ntp"},
    ],
    ids=str,
)
def test_the_cost_is_what_batches_of_random_documents_cost_on_average(entry):
    """Within 1 %, which is at least four standard deviations of so many documents."""
    rng = np.random.default_rng()
    lengths = rng.integers(1, 60, 300_000)
    lengths[:50] = 1
    spec = read_spec(entry)
    tokens = TokenRoles(special_ids=(0, 1, 2), placeholder_id=0, vocabulary=1000)
    batch = build_objectives([spec], tokens)[0].build(
        random_documents(lengths, rng), BatchKey(seed=int(rng.integers(2**31)), epoch=0)
    )

    kept = np.diff(batch.plan.cu_seqlens.numpy()).astype(np.float64)
    live = np.bincount(batch.plan.live_document.numpy(), minlength=len(kept))
    pairs = kept * (kept + 1) / 2 if entry["kind"] == "ntp" else kept * (kept + live)
    spans = np.zeros(0) if batch.plan.span_cu_seqlens is None else np.diff(batch.plan.span_cu_seqlens.numpy())
    cost = spec.cost(lengths)
    assert cost.kept_rows.sum() == pytest.approx(kept.sum(), rel=0.01)
    assert cost.live_rows.sum() == pytest.approx(live.sum(), rel=0.01, abs=1)
    span_pairs = (spans * (spans + 1.0) / 2).sum()
    assert cost.pairs.sum() == pytest.approx(pairs.sum() + span_pairs, rel=0.01)
    assert (cost.span_pairs is None) == (batch.plan.span_cu_seqlens is None)
    if cost.span_pairs is not None:
        assert cost.span_pairs.sum() == pytest.approx(span_pairs, rel=0.01)
    assert cost.head_rows.sum() == pytest.approx(len(batch.targets), rel=0.01)
    assert {len(column) for column in vars(cost).values() if column is not None} == {len(lengths)}


def test_a_document_that_is_one_span_costs_a_causal_pass_over_its_rows():
    lengths = np.array([1, 2, 3, 700])
    for unit in ("token", "span"):
        cost = AbiSpec(mask=MaskSpec(rate=1.0, unit=unit)).cost(lengths)
        rows = np.maximum(lengths - 2.0, 0)
        assert cost.live_rows == pytest.approx(rows)
        assert cost.pairs == pytest.approx(1 + rows + rows * (rows + 1) / 2, rel=1e-3)
        cost = AbiSpec(mask=MaskSpec(rate=1.0, unit=unit), spans="left_to_right").cost(lengths)
        rows = lengths - 1.0
        assert cost.pairs == pytest.approx(1 + rows + rows * (rows + 1) / 2)


def test_no_two_kinds_have_one_colour_in_the_monitor():
    shipped = [kind.spec for kind in KINDS.values() if kind.objective.startswith("bico_ds.")]
    assert len({spec.monitor.colour for spec in shipped}) == len(shipped) >= 4


def random_documents(lengths: NDArray[np.int64], rng: np.random.Generator) -> Documents:
    none = np.zeros_like(lengths)
    return Documents(
        token_ids=rng.integers(3, 999, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        source=none,
        id=np.arange(len(lengths)),
        piece=none,
        prompt_length=none,
        group=none,
    )


def test_an_identity_is_what_differs_from_the_field_s_own_default():
    class OwnSpec(BicoSpec):
        mask: MaskSpec = MaskSpec(rate=0.4, unit="span")

    assert "mask" not in OwnSpec().identity()
    assert OwnSpec(mask=MaskSpec(unit="span")).identity()["mask"] == {"rate": 0.15}
    assert OwnSpec(mask=MaskSpec(rate=0.4)).identity()["mask"] == {"unit": "token"}
    assert BicoSpec(mask=MaskSpec(rate=(0.4, 0.4))).identity() == BicoSpec(mask=MaskSpec(rate=0.4)).identity()


class Noise(Section):
    kind: Literal["noise"] = "noise"
    share: float = 0.1


class Swap(Section):
    kind: Literal["swap"] = "swap"
    share: float = 0.1
    parts: list[Noise] = Field([])


class NoKind(Section):
    strength: float = 0.1


class OfSections(BicoSpec):
    optional: MaskSpec | None = None
    several: list[MaskSpec] = Field([])
    named: dict[str, Annotated[MaskSpec | None, "an annotation"]] = Field({})
    either: Noise | Swap | None = None
    usual: Noise | Swap = Noise()
    no_kind: NoKind | MaskSpec | None = None
    words: frozenset[int] = frozenset()


@pytest.mark.parametrize(
    ("given", "identity"),
    [
        ({"optional": {}}, {"optional": {}}),
        ({"optional": {"rate": 0.15, "unit": "span"}}, {"optional": {"unit": "span"}}),
        ({"several": [{}, {"rate": 0.4}]}, {"several": [{}, {"rate": 0.4}]}),
        ({"named": {"a": {}, "b": None, "c": {"rate": 0.4}}}, {"named": {"a": {}, "b": None, "c": {"rate": 0.4}}}),
        ({"either": {"kind": "noise"}}, {"either": {"kind": "noise"}}),
        ({"either": {"kind": "swap", "parts": [{}]}}, {"either": {"kind": "swap", "parts": [{}]}}),
        ({"usual": {"kind": "noise", "share": 0.2}}, {"usual": {"share": 0.2}}),
        ({"usual": {"kind": "swap", "share": 0.2}}, {"usual": {"kind": "swap", "share": 0.2}}),
        ({"no_kind": {"strength": 0.1}}, {"no_kind": {"strength": 0.1}}),
        ({"words": [8, 0]}, {"words": [0, 8]}),
        ({"words": [0, 8]}, {"words": [0, 8]}),
    ],
    ids=str,
)  # fmt: skip
def test_an_identity_leaves_out_the_defaults_of_sections_that_are_optional_or_in_a_list(given, identity):
    assert OfSections.model_validate(given).identity() == {"kind": "bico", "version": 1, **identity}


def test_a_key_that_a_section_gets_later_changes_no_identity():
    class Later(MaskSpec):
        sharpness: float = 1.0

    class Now(OfSections):
        optional: Later | None = None
        several: list[Later] = Field([])

    given = {"optional": {"unit": "word"}, "several": [{"rate": 0.3}, {}]}
    assert Now.model_validate(given).identity() == OfSections.model_validate(given).identity()


def test_spans_without_an_end_have_a_cost():
    spec = BicoSpec(mask=MaskSpec(rate=0.4, unit="span", mean_span=float("inf")))
    assert np.isfinite(spec.cost(np.array([1, 2, 30])).pairs).all()


def test_a_recorded_recipe_is_read_where_its_own_objectives_are_gone():
    values = load_recipe("tiny_ntp").model_dump(mode="json")
    values |= {"imports": ["gone.py"], "objectives": [{"kind": "gone", "rate": 3}]}
    recipe = recorded_recipe(values, Path("manifest.json"), objectives=False)
    assert recipe.model == load_recipe("tiny_ntp").model
    with pytest.raises(UserError, match=r"manifest\.json.*there is no objective of kind 'gone'"):
        recorded_recipe(values, Path("manifest.json"))


OWN = """
from typing import ClassVar, Literal
from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.table import register
class Own({base}):
    kind: Literal["{kind}"] = "{kind}"
register(Own, {target})
"""


@pytest.mark.parametrize(
    ("base", "kind", "target", "message"),
    [
        (
            "ObjectiveSpec",
            "bare",
            "'a.b:C'",
            "Own: it needs the method `cost` and a MonitorPlace as `monitor`",
        ),
        ("NtpSpec", "bare", "'a.b'", "Own: 'a.b' is not MODULE:CLASS"),
        ("NtpSpec", "bare", "''", "Own: '' is not MODULE:CLASS"),
        ("NtpSpec", "bare", "'.b:C'", r"Own: '\.b:C' is not MODULE:CLASS"),
        ("NtpSpec", "bare", "'a:b:C'", "Own: 'a:b:C' is not MODULE:CLASS"),
        ("NtpSpec", "all", "'a.b:C'", "Own: 'all' is the name of the loss over all objectives"),
        (
            "NtpSpec",
            "ntp",
            "'bico_ds.objectives.ntp:NextTokenPrediction'",
            r"objective kind 'ntp': \S+NtpSpec with .* has it, so ntp_\w+\.Own with",
        ),
    ],
)
def test_an_incomplete_objective_is_refused_when_it_is_registered(tmp_path, base, kind, target, message):
    file = tmp_path / f"{kind}.py"
    file.write_text(OWN.format(base=base, kind=kind, target=target))
    with pytest.raises(UserError, match=rf"imports\.0: {message}"):
        load_recipe("tiny_ntp", [f"imports=[{file}]"])
    assert load_recipe("tiny_ntp").objectives == [NtpSpec()]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("from bico_ds.batch import Documents", "it is in bico_ds.documents now"),
        ("from bico_ds.objectives.base import TokenFacts", "it is TokenRoles now"),
        ("from bico_ds.config.errors import UserError", "it is bico_ds.common.errors now"),
    ],
)
def test_a_name_that_has_moved_is_answered_with_its_new_place(tmp_path, line, hint):
    file = tmp_path / "own.py"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=f"ImportError: .*; {hint}|ModuleNotFoundError: .*; {hint}"):
        load_recipe("tiny_ntp", [f"imports=[{file}]"])


def test_a_file_of_the_users_own_brings_an_objective(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("doubling.py").symlink_to(DOUBLING)
    overrides = ["imports=[doubling.py]", "objectives=[{kind: doubling, shift: 2}]"]
    recipe = load_recipe("tiny_ntp", overrides)
    assert recipe.objectives[0].identity() == {"kind": "doubling", "version": 1, "shift": 2}
    Path("again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("again.yaml") == recipe
    assert recorded_recipe(recipe.model_dump(mode="json"), Path("manifest.json")) == recipe
    with pytest.raises(UserError, match=r"objectives\.0\.shif: unknown key \(did you mean 'shift'\?\)"):
        load_recipe("tiny_ntp", [*overrides[:1], "objectives=[{kind: doubling, shif: 2}]"])


@pytest.mark.parametrize(
    "name", ["my-own.py", "my own.py", "v1.2.py", ".mine.py", "a:b.py", "2é.py", "my-module"]
)
def test_any_file_name_and_any_module_can_bring_an_objective(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = f"named {name}"
    text = OWN.format(base="NtpSpec", kind=kind, target="f'{__name__}:Mine'")
    file = Path(name if name.endswith(".py") else f"{name}.py")
    file.write_text(f"from bico_ds.objectives.ntp import NextTokenPrediction as Mine\n{text}")
    Path("mine.yaml").write_text(
        f"extends: tiny_ntp\nimports: ['{name}']\nobjectives: [{{kind: '{kind}'}}]\n"
    )
    objectives = load_recipe("mine.yaml").objectives
    built = build_objectives(objectives, TokenRoles(special_ids=(), placeholder_id=0, vocabulary=9))
    assert built[0].identity() == {"kind": kind, "version": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.py", None, r"mine\.yaml:2: imports\.0: there is no file 'nowhere\.py'"),
        ("no_such_module.part", None, r"mine\.yaml:2: imports\.0: there is no module 'no_such_module\.part' here"),
        ("broken.py", "def f(:", r"'broken\.py' does not parse: .*broken\.py:1: "),
        ("fails.py", "\nraise KeyError('x')", r"'fails\.py' fails at .*fails\.py:2: KeyError: 'x'"),
        ("exits.py", "raise SystemExit(0)", r"'exits\.py' fails at .*exits\.py:1: SystemExit: 0"),
        ("needs.py", "import no_such_module", r"'needs\.py' fails at .*needs\.py:1: ModuleNotFoundError"),
        ("its_own.py", "\nimport its_own", r"'its_own\.py' fails at .*its_own\.py:2: ModuleNotFoundError"),
        (
            "twice.py",
            "from bico_ds.config.objectives.ntp import NtpSpec\n"
            "from bico_ds.config.objectives.table import register\n"
            "register(NtpSpec, f'{__name__}:Mine')",
            r"objective kind 'ntp': \S+NtpSpec with \S+:NextTokenPrediction has it, so \S+NtpSpec with twice_\w+:Mine",
        ),
    ],
)  # fmt: skip
def test_an_import_that_fails_is_one_message_with_its_place(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    Path("mine.yaml").write_text(f"extends: tiny_ntp\nimports: [{name}]\n")
    with pytest.raises(UserError, match=message):
        load_recipe("mine.yaml")


def test_a_relative_import_begins_at_the_working_directory_and_one_beside_the_recipe_is_named(
    tmp_path, monkeypatch
):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "doubling.py").symlink_to(DOUBLING)
    (tmp_path / "room" / "own.yaml").write_text("extends: tiny_ntp\nimports: [doubling.py]\n")
    (tmp_path / "mine.yaml").write_text("extends: room/own.yaml\n")
    monkeypatch.chdir(tmp_path)
    for recipe in ("room/own.yaml", "mine.yaml"):  # of the latter, beside the file that has the line
        with pytest.raises(UserError) as caught:
            load_recipe(recipe)
        assert str(caught.value) == (
            "room/own.yaml:2: imports.0: there is no file 'doubling.py' in the working directory, "
            f"'{tmp_path}'; there is one beside the recipe: write 'room/doubling.py'"
        )
        assert load_recipe(recipe, ["imports=[room/doubling.py]"]).imports[0].text == "room/doubling.py"
    with pytest.raises(UserError, match=rf"no file 'gone\.py' in the working directory, '{tmp_path}'$"):
        load_recipe("mine.yaml", ["imports=[gone.py]"])
    with pytest.raises(UserError, match=r"imports\.0: there is no file '/gone\.py'$"):
        load_recipe("mine.yaml", ["imports=[/gone.py]"])


def test_a_class_that_the_table_names_and_nobody_wrote_is_refused(tmp_path):
    file = tmp_path / "absent.py"
    file.write_text(
        "from typing import Literal\n"
        "from bico_ds.config.objectives.ntp import NtpSpec\n"
        "from bico_ds.config.objectives.table import register\n"
        "class AbsentSpec(NtpSpec):\n    kind: Literal['absent'] = 'absent'\n"
        "register(AbsentSpec, f'{__name__}:Absent')\n"
    )
    recipe = load_recipe("tiny_ntp", [f"imports=[{file}]", "objectives=[{kind: absent}]"])
    with pytest.raises(UserError, match=r"objective kind 'absent': cannot find absent_\w+:Absent"):
        build_objectives(recipe.objectives, TokenRoles(special_ids=(), placeholder_id=0, vocabulary=9))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # whole: `token': leave` would look like a secret, which messages leave out
        ("kind: abi, mask: {mean_span: 5}", "'unit' is 'token', which has none; leave it out, or set unit: span"),
        ("kind: identity_bridge", "there is no objective of kind 'identity_bridge' (it is of the data: set 'derive:"),
        ("kind: abi, spans: left_to_rigth", "(found 'left_to_rigth') (did you mean 'left_to_right'?)"),
    ],
)  # fmt: skip
def test_what_an_objective_would_not_do_is_refused_with_what_would(objective, expected):
    assert expected in error_of("tiny_base", f"objectives=[{{{objective}}}]")
