"""A whole run: steps at the objectives' probabilities, evaluations and checkpoints with their shares, and its price."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import write_facts
from bico_ds.evaluation.tasks.task import TASK_NAMES, load_tasks
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.ranges import Range
from bico_ds.planner.run_time import RunTime, prompts_per_task, run_time
from bico_ds.planner.step_time import StepTime, step_time
from bico_ds.planner.workload import Texts, micro_batches

DISK = Range(2e9, 8e9)


def planned(
    *overrides: str, name: str = "llama70b_bico", steps: int | None = 400, price: float | None = None
) -> tuple[Recipe, list[StepTime], RunTime]:
    recipe = load_recipe(name, overrides)
    architecture = read_architecture(recipe.model)
    zero = read_zero(recipe, hidden_size=architecture.hidden, ranks=64, ranks_per_node=8, on_cuda=True)
    deployment = Deployment(device=DEVICES["h100-80g"], nodes=8, ranks_per_node=8, zero=zero)
    texts = Texts(lengths=np.full(10, recipe.data.capacity), tokens=None, source="full bins")
    times = [step_time(recipe, architecture, deployment, batch) for batch in micro_batches(recipe, texts)]
    found = run_time(recipe, architecture, deployment, steps, times, price=price, disk_bandwidth=DISK)
    return recipe, times, found


@pytest.mark.parametrize("limit", [None, 3])
def test_the_prompts_of_the_embedded_task_are_those_of_its_files(tmp_path, limit):
    rng = np.random.default_rng()
    sizes = dict(zip(FactsSpec.model_fields, (7, *rng.integers(2, 9, 5).tolist()), strict=True))
    facts = FactsSpec(**sizes)
    write_facts(facts, tmp_path)
    recipe = load_recipe(
        "tiny_bico",
        [
            f"evaluation.tasks={json.dumps(TASK_NAMES)}",
            f"evaluation.limit={limit or 'null'}",
            f"data.facts={json.dumps(sizes)}",
        ],
    )
    asked = {task.name: len(task.questions) for task in load_tasks(tmp_path, TASK_NAMES, limit)}
    assert prompts_per_task(recipe)[0] == asked


def test_prompts_in_a_folder_are_assumed_and_said_to_be():
    recipe = load_recipe("tiny_bico", ["evaluation.folder=elsewhere", "evaluation.limit=null"])
    counts, source = prompts_per_task(recipe)
    assert set(counts.values()) == {300} and source == "assumed"


def test_own_questions_count_by_their_limit_or_are_assumed():
    own = "{kind: pairs, name: company, file: x, limit: 5}, {kind: questions, name: policy, file: x}"
    tasks = [f"evaluation.tasks=[n2d, {own}]", "evaluation.limit=7"]
    counts, source = prompts_per_task(load_recipe("tiny_bico", tasks))
    assert counts == {"n2d": 7, "company_forward": 5, "company_backward": 5, "policy": 7}
    counts, source = prompts_per_task(load_recipe("tiny_bico", [*tasks, "evaluation.limit=null"]))
    assert counts["company_backward"] == 5 and counts["policy"] == 300 and source == "assumed"
    *_, found = planned("evaluation.tasks=[{kind: questions, name: policy, file: x, limit: 64}]")
    assert found.events[0].how.startswith("64 prompts (limit at most)")


def test_the_mean_step_is_weighed_by_probabilities():
    _, times, found = planned()
    assert found.mean_step_seconds.low == pytest.approx(sum(t.seconds.low for t in times) / 2)
    _, times, found = planned("objectives.0.probability=0.9", "objectives.1.probability=0.1")
    expected = 0.9 * times[0].seconds.high + 0.1 * times[1].seconds.high
    assert found.mean_step_seconds.high == pytest.approx(expected)


def test_hours_are_all_steps_and_events_and_money_follows():
    _, _, found = planned(price=2.5)
    assert found.hours is not None and found.device_hours is not None and found.cost is not None
    events = sum(event.count * event.seconds.high for event in found.events)
    assert found.hours.high * 3600 == pytest.approx(400 * found.mean_step_seconds.high + events)
    assert found.device_hours.low == pytest.approx(64 * found.hours.low)
    assert found.cost.high == pytest.approx(2.5 * found.device_hours.high)
    assert planned()[2].cost is None


@pytest.mark.parametrize(("every", "count"), [("null", 1), ("100", 4), ("150", 3), ("1000", 1)])
def test_events_come_every_so_many_steps_and_at_the_end(every, count):
    *_, found = planned(f"checkpoint.every_steps={every}", f"evaluation.every_steps={every}")
    counts = {event.name: event.count for event in found.events}
    assert counts == {"evaluation": count, "checkpoint": count, "export": 1}


def test_shares_are_within_the_extremes_of_part_and_rest():
    *_, found = planned()
    for event in found.events:
        part = event.seconds.times(event.count)
        whole = Range(found.hours.low * 3600, found.hours.high * 3600)
        assert part.low / whole.high <= event.share.low <= part.low / whole.low
        assert (
            part.high / whole.high
            <= event.share.high
            <= part.high / (part.high + whole.low - part.low) + 1e-12
        )


def test_a_model_too_large_for_replicas_gathers_all_weights_for_every_token():
    *_, found = planned("evaluation.max_new_tokens=10")
    evaluation = found.events[0]
    # 256 persons of each kind, 4 prompts, 4 tasks: 1024 prompts per task over 64 ranks of batches of 64, 10 tokens each.
    assert "4,096 prompts" in evaluation.how and "141 GB" in evaluation.how
    crossing = 141.1e9 * 63 / 64 / 8 / DEVICES["h100-80g"].network_bandwidth
    assert evaluation.seconds.low > 4 * 10 * crossing
    *_, whole = planned("deepspeed.config=zero2_bf16", "evaluation.max_new_tokens=10")
    assert whole.events[0].seconds.low < evaluation.seconds.low / 2


def test_no_tasks_no_evaluation_and_no_export_none():
    *_, found = planned("evaluation.tasks=[]", "checkpoint.export=false")
    assert [event.name for event in found.events] == ["checkpoint"]


def test_without_a_number_of_steps_what_comes_regularly_still_has_a_share():
    *_, found = planned("checkpoint.every_steps=100", "evaluation.every_steps=null", steps=None)
    assert found.steps is None and found.hours is None and found.cost is None
    (checkpoint,) = found.events
    assert checkpoint.name == "checkpoint" and checkpoint.count == 1
    rest = found.mean_step_seconds.high * 100
    assert checkpoint.share.low == pytest.approx(checkpoint.seconds.low / (checkpoint.seconds.low + rest))
