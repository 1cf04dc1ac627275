"""`bico-ds plan`: an answer for every recipe, each number where it belongs, and one message for each mistake."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import yaml

from bico_ds.commands.show.plan import main, planned_nodes
from bico_ds.config.load import list_recipes, load_recipe
from bico_ds.data.planned_texts import texts_of
from bico_ds.planner.decisions import decide
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import make_plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report import as_json
from bico_ds.planner.report.quantities import GIB, number, span, time
from bico_ds.planner.report.text import print_plan
from tests import ROOT
from tests.common.whole_words import check_whole

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """`tool("--price", "2")`: exit code, output and errors of `bico-ds plan`, by default for llama3_8b_bico."""
    monkeypatch.chdir(tmp_path)  # no model, data or cache is here

    def run(*arguments: str, recipe: str = "llama3_8b_bico") -> tuple[int, str, str]:
        try:
            code = main(["--recipe", recipe, *arguments])
        except SystemExit as caught:
            code = int(caught.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def planned(tool):
    """The JSON object of a plan."""

    def run(*arguments: str, recipe: str = "llama3_8b_bico") -> dict[str, Any]:
        code, shown, errors = tool(*arguments, "--json", recipe=recipe)
        assert (code, errors) == (0, "")
        return json.loads(shown)

    return run


def test_the_script_answers_for_70b_on_64_gpus_without_weights_data_or_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--recipe", "llama70b_bico"]
    command += ["--nodes", "8", "--gpus-per-node", "8", "--gpu", "h100-80g", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    plan = json.loads(done.stdout)
    assert plan["deployment"]["ranks"] == 64
    assert plan["model"]["parameters"] == 70_553_706_496
    assert plan["verdict"] == "fits", plan["sentence"]
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if "_ntp" not in name])
def test_every_shipped_recipe_is_planned_on_100_columns_with_the_verdict_first(tool, recipe, tmp_path):
    """On the nodes that the recipe itself means. The controls by next-token prediction are like them."""
    folder = tmp_path / "models" / "smollm2-135m"  # the one model whose recipes have no model.config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    code, shown, errors = tool("--gpu", "h100-80g", "--price", "2.5", recipe=recipe)
    assert (code, errors) == (0, "")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"{recipe} on ")
    assert re.match(r"(fits|may not fit|does not fit): ", lines[1])


@pytest.mark.parametrize("width", [80, 60])
def test_no_table_of_a_plan_has_a_word_in_two_lines(width):
    recipe = load_recipe("llama70b_bico")
    plan = make_plan(
        recipe, DEVICES["h100-80g"], nodes=8, ranks_per_node=8, texts=texts_of(recipe), price=2.5
    )
    decisions = decide(plan)
    check_whole(lambda console: print_plan(plan, decisions, [], console), width, names_may_break=width < 80)


def test_the_report_shows_the_numbers_of_the_object(tool, planned):
    shown, plan = tool()[1], planned()
    peak = next(moment for moment in plan["memory"]["moments"] if moment["is_peak"])
    lines = shown.partition("Memory of a device at its peak")[2].splitlines()
    together = {"low": sum(i["bytes"]["low"] for i in peak["items"]), "high": peak["bytes"]["high"]}
    for item in [*peak["items"], {"name": "together", "bytes": together}]:
        line = next(line for line in lines if line.startswith(f" {item['name']}"))
        cells = line.removeprefix(f" {item['name']}").split()[:3]
        assert [number(item["bytes"][bound] / GIB) for bound in ("low", "high")] == cells[:2]
    for step in plan["steps"]:
        assert time(Range(**step["seconds"])) in shown
        assert span(Range(**step["represented_per_second"])) in shown


def test_every_key_of_the_object_is_documented(planned):
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for part in value.values() for key in keys(part)}
        return {key for part in value for key in keys(part)} if isinstance(value, list) else set()

    found = keys(planned("--price", "2", "--set", "training.micro_batch_bins=2"))
    assert {key for key in found if not re.search(rf"\b{key}\b", str(as_json.__doc__))} == set()


@pytest.mark.parametrize(
    ("options", "nodes", "per_node"),
    [
        ((), 8, 8),
        (("--nodes", "4"), 4, 8),
        (("--nodes", "16"), 16, 4),
        (("--gpus-per-node", "4"), 16, 4),
        (("--nodes", "2", "--gpus-per-node", "4"), 2, 4),
        (("--nodes", "128"), 128, 8),
        (("--nodes", "3"), 3, 8),
        (("--set", "distributed.world_size=16"), 2, 8),
        (("--set", "distributed.world_size=null"), 1, 8),
        (("--set", "distributed.world_size=null", "--set", "training.global_batch_bins=6"), 1, 6),
        (("--set", "distributed.world_size=null", "--nodes", "4"), 4, 8),
    ],
)
def test_what_is_not_given_of_nodes_and_gpus_follows_from_the_recipe(options, nodes, per_node):
    parsed = main.parse(["--recipe", "llama70b_bico", *options])
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    assert planned_nodes(recipe, DEVICES["h100-80g"], parsed) == (nodes, per_node)


def test_other_ranks_than_the_recipe_s_are_warned_of(planned):
    warned = planned("--set", "distributed.world_size=16", "--nodes", "1", "--gpus-per-node", "8")["warnings"]
    assert any("made for 16 ranks" in line for line in warned)
    assert not any("made for" in line for line in planned("--set", "distributed.world_size=8")["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100-80"], "--gpu: 'h100-80' is neither .*did you mean 'h100-80g'"),
        (["--gpu", 5000 * "x"], "--gpu: 'x+…': a path has at most 4,095 bytes"),
        (["--set", "distributed.gpu=b20"], "distributed.gpu: 'b20' is neither .*did you mean 'b200"),
        (["--set", "distributed.gpu=null"], "which GPU.*h100-80g.*distributed.gpu"),
        (["--nodes", "3"], "global_batch_bins .16. must be a multiple .* x ranks .24.*choose 24"),
        (["--nodes", "0"], "--nodes: must be at least 1"),
        (["--gpus-per-node", "0"], "--gpus-per-node: must be at least 1"),
        (["--price", "-2"], "--price: must be at least"),
        (["--price", "cheap"], "--price: 'cheap' is not a number"),
        (["--text-length", "4096"], "--text-length 4096: .*data.capacity .2,048"),
        (["--set", "model.attention_backend=cpu-flash"], "cpu-flash runs on CPUs alone"),
        (["--set", "model.config=null"], "models/llama-3-8b' is no folder .*model.config"),
        (["--set", "model.config=null", "--set", "model.path=meta-llama/Llama"], "fetch the model there"),
        (["--set", "model.config.model_type=lama"], "did you mean 'llama'"),
        (["--set", "deepspeed.config=zero3_bf61"], "did you mean 'zero3_bf16'"),
        (
            ["--set", "distributed.world_size=64", "--gpus-per-node", "7"],
            "64 ranks .* do not fill nodes of 7",
        ),
    ],
)
def test_each_mistake_is_one_message_and_exit_code_2(tool, arguments, message):
    code, shown, errors = tool(*arguments)
    assert (code, shown) == (2, "")
    assert re.search(message, errors.splitlines()[-1]), errors


def a_gpu(tmp_path, **changes: object) -> str:
    """The file of a GPU like an H100, but for the changes; and its path."""
    values = asdict(DEVICES["h100-80g"]) | {"name": "mine", "title": "a GPU of mine"} | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


def test_a_gpu_of_ones_own_is_planned_and_a_mistake_in_its_file_named_with_the_line(tool, planned, tmp_path):
    plan = planned("--gpu", a_gpu(tmp_path, memory_bytes=30 * GIB))
    assert plan["deployment"]["title"] == "a GPU of mine"
    assert plan["memory"]["available"] == 30 * GIB
    code, _, errors = tool("--gpu", a_gpu(tmp_path, memory_byte=1))
    assert code == 2
    assert re.search(r"mine\.yaml:\d+: memory_byte: unknown key \(did you mean 'memory_bytes'", errors)


def test_what_does_not_fit_names_the_largest_item_and_a_change_that_fits(planned, tmp_path):
    whole = planned()["memory"]["moments"]
    most = max(moment["bytes"]["high"] for moment in whole)
    plan = planned("--gpu", a_gpu(tmp_path, memory_bytes=int(0.8 * most)))
    assert plan["verdict"] in ("does not fit", "may not fit")
    peak = next(moment for moment in plan["memory"]["moments"] if moment["is_peak"])
    largest = max(peak["items"], key=lambda item: item["bytes"]["high"])
    assert f"the largest item is {largest['name']}" in plan["sentence"]
    assert " ".join(plan["change"]["words"]) in plan["sentence"]
    assert plan["change"]["memory"]["high"] <= 0.8 * most


def test_the_cost_is_the_price_of_all_gpu_hours(planned):
    run = planned("--price", "2.5", "--epoch-tokens", "50000000")["run"]
    for bound in ("low", "high"):
        assert run["cost"][bound] == pytest.approx(2.5 * run["device_hours"][bound])
        assert run["device_hours"][bound] == pytest.approx(8 * run["hours"][bound])
    assert planned()["run"]["cost"] is None


def test_steps_follow_from_the_tokens_of_an_epoch(planned):
    plan = planned("--epoch-tokens", "12345678", "--set", "training.epochs=3")
    assert plan["run"]["steps"] == math.ceil(3 * 12345678 / (16 * 2048))
    many = planned("--epoch-tokens", "15000000000000", "--set", "training.epochs=1")
    assert many["run"]["steps"] == math.ceil(15e12 / (16 * 2048))
    unread = ["--set", "data.sources=[{files: [facts.jsonl]}]"]
    assert planned(*unread)["run"]["steps"] is None
    assert planned(*unread, "--set", "training={steps: 70}")["run"]["steps"] == 70


def test_slower_links_and_disks_take_longer(planned):
    def time_of(*options: str) -> tuple[float, float]:
        plan = planned(*options, "--nodes", "2", "--gpus-per-node", "4")
        saved = next(event for event in plan["run"]["events"] if "checkpoint" in event["name"])
        return max(step["seconds"]["high"] for step in plan["steps"]), saved["seconds"]["low"]

    step, checkpoint = time_of("--disk-gbyte", "10")
    assert time_of("--network-gbit", "10", "--disk-gbyte", "10")[0] > step
    assert time_of("--link-gbyte", "1", "--disk-gbyte", "10")[0] > step
    assert time_of("--disk-gbyte", "1")[1] == pytest.approx(10 * checkpoint, rel=0.05)


def test_shares_above_5_per_cent_are_warned_of(planned):
    often = planned("--set", "checkpoint.every_steps=1", "--disk-gbyte", "0.1")
    assert any(line.startswith("checkpoint") for line in often["warnings"])
    never = ["--set", "evaluation.tasks=[]", "--set", "checkpoint.every_steps=null"]
    seldom = planned(
        *never, "--disk-gbyte", "1000", "--set", "training={steps: 100000, global_batch_bins: 16}"
    )
    assert seldom["warnings"] == []


def test_a_model_that_is_not_here_is_planned_from_the_recipe_and_that_is_noted(planned, tmp_path):
    assert any("models/llama-3-8b' is not on this machine" in note for note in planned()["notes"])
    folder = tmp_path / "models" / "llama-3-8b"
    folder.mkdir(parents=True)
    config = load_recipe("llama3_8b_bico").model.config
    (folder / "config.json").write_text(json.dumps({**(config or {}), "num_hidden_layers": 2}))
    plan = planned()
    assert plan["notes"] == []
    assert plan["model"]["parameters"] < 2e9


@pytest.mark.parametrize("config", ["zero3_bf16", "zero3_offload_cpu"])
def test_the_upper_bound_of_a_step_is_the_sum_of_the_parts_that_are_shown(planned, config):
    for step in planned("--set", f"deepspeed.config={config}")["steps"]:
        parts = [step["products"], step["elementwise"], step["optimizer"]]
        parts += [transfer["seconds"] for transfer in step["transfers"]]
        assert sum(part["high"] for part in parts) == pytest.approx(step["seconds"]["high"])


def test_links_that_are_given_are_not_said_to_be_the_vendor_s(planned):
    given = planned("--network-gbit", "100")["assumptions"]
    assert "links of a device, each way: 450 GB/s in its node, 12.5 GB/s to others" in given
    assert given[-1].endswith("but links as they are given")
    assert not planned()["assumptions"][-1].endswith("given")


def test_a_micro_batch_beyond_those_that_are_tried_is_not_called_the_largest(tool):
    _, shown, _ = tool("--gpu", "h100-80g", recipe="tiny_base")
    assert "4,096 bins of 160 tokens at least, more are not tried" in " ".join(shown.split())
    _, shown, _ = tool()
    assert "at least" not in shown


def test_checkpoints_that_stay_are_counted_where_the_steps_follow_from_the_texts(planned):
    def kept(*options: str) -> dict[str, Any]:
        return next(item for item in planned(*options)["disk"] if item["name"] == "checkpoints")

    options = ["--set", "checkpoint.keep_every_steps=100"]
    assert planned()["run"]["steps"] == 720
    of_steps = ["--set", "training.epochs=null", "--set", "training.steps=720"]
    assert kept(*options) == kept(*options, *of_steps)
    one = kept()["bytes"]["high"] / 2
    assert kept(*options)["bytes"] == {"low": 7 * one, "high": 8 * one}
    unread = ["--set", "data.sources=[{files: [facts.jsonl]}]"]
    assert "not counted" in kept(*options, *unread)["how"]
