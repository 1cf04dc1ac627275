"""What release 0.1.0 wrote of its objectives is read as what they are called today."""

from __future__ import annotations

import json

import pytest

from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.data.loading.identity import changes
from bico_ds.data.loading.legacy_identity import translate_state
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.build import build_objectives
from tests import EARLIER_RUN

TOKENS = TokenRoles(special_ids=(0, 1, 2, 3), placeholder_id=3, vocabulary=51)
MASK = "MaskSpec(rate={}, unit='{}', mean_span=3.0, eligible='{}')"
INF = float("inf")
BICO = "MaskDenoising(policy=MaskPolicy(spec={}, special_ids=(0, 1, 2, 3)), placeholder_id=3, name='bico_2')"


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        ("NextTokenPrediction(name='ntp', loss_on='all')", NtpSpec()),
        ("NextTokenPrediction(name='ntp', loss_on='completion')", NtpSpec(loss_on="completion")),
        (BICO.format(MASK.format(0.15, "token", "all")), BicoSpec()),
        (BICO.format(MASK.format(0.4, "word", "all")), {"rate": 0.4, "unit": "word"}),
        (BICO.format(MASK.format("(0.2, 0.6)", "span", "all")), {"rate": (0.2, 0.6), "unit": "span"}),
        (BICO.format(MASK.format("(0.4, 0.4)", "token", "all")), {"rate": (0.4, 0.4)}),
        (BICO.format(MASK.format("(0.15, 0.15)", "token", "all")), {"rate": (0.15, 0.15)}),
        (BICO.format(MASK.format("(1.0, 1.0)", "word", "all")), {"rate": (1.0, 1.0), "unit": "word"}),
        (BICO.format(MASK.format(0.15, "token", "completion")), {"eligible": "completion"}),
        (
            BICO.format(MASK.format(0.4, "span", "all")).replace("3.0", "inf"),
            {"rate": 0.4, "unit": "span", "mean_span": INF},
        ),
    ],
    ids=str,
)
def test_an_objective_known_by_its_repr_is_the_one_of_today(written, spec):
    if isinstance(spec, dict):
        spec = BicoSpec.model_validate({"mask": spec})
    state = translate_state({"version": 1, "step": 3, "identity": {"seed": 1, "objectives[0]": written}})
    assert (state["version"], state["step"], state["identity"]["seed"]) == (2, 3, 1)
    assert state["cursor_of"] == [0]
    assert state["identity"]["objectives[0]"] == build_objectives([spec], TOKENS)[0].identity()


def test_a_change_since_a_checkpoint_of_0_1_0_is_named_by_its_key():
    manifest = json.loads((EARLIER_RUN / "run" / "checkpoints" / "step-000006" / "manifest.json").read_text())
    before = translate_state(manifest["state"]["loader"])["identity"]
    now = json.loads(json.dumps(before))
    assert changes(before, now) == []
    now["objectives[1]"]["mask"]["rate"] = 0.3
    del now["objectives[2]"]["mask"]["unit"]
    assert changes(before, now) == [
        "objectives[1].mask.rate: 0.4 in the checkpoint, 0.3 now",
        "objectives[2].mask.unit: span in the checkpoint, (not given) now",
    ]
