"""The planner's device memory is what real ranks hold, at rest and at the peak of each part of a step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.batch import PackedBatch
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.documents import Document, Documents
from bico_ds.model.build import build_model
from bico_ds.native.library import native_refusal
from bico_ds.objectives.base import BatchKey
from bico_ds.optim.schedule import build_scheduler
from bico_ds.planner.activations import activation_memory
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.items import total
from bico_ds.planner.memory import MemoryPlan, device_memory
from bico_ds.planner.workload import MicroBatch
from bico_ds.planner.zero.gathering import visits
from bico_ds.planner.zero.modules import modules_of
from bico_ds.runtime.ds_config import build_ds_config
from tests.distributed.live_memory import LiveMemory, build
from tests.distributed.model_ranks import run_on_ranks
from tests.distributed.test_zero import OBJECTIVES

pytestmark = pytest.mark.distributed

VOCABULARY, STEPS, MEASURED = 1000, 8, 5
ELSEWHERE = 0.03
PART_OF = {"forward pass": "forward", "head": "forward", "optimizer": "update"}
LORA = "model.lora={rank: 8, alpha: 8, dropout: 0.01}"
CHECKPOINTED = "model.activation_checkpointing=1"
TIED, DEEP = "model.config.tie_word_embeddings=true", "model.config.num_hidden_layers=7"
HPZ, OFFLOAD = "deepspeed.config=zero3_hpz", "deepspeed.config=zero3_offload_cpu"
# Buckets that a model of this size fills several times, as large ones fill theirs, and weights that are let go.
SMALL = (
    "deepspeed.overrides.zero_optimization.reduce_bucket_size=60000",
    "deepspeed.overrides.zero_optimization.stage3_prefetch_bucket_size=30000",
    "deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=200",
    "deepspeed.overrides.zero_optimization.stage3_max_reuse_distance=150000",
)


@dataclasses.dataclass(frozen=True)
class Case:
    stage: int
    objective: str
    dtype: str
    more: tuple[str, ...] = ()
    hidden: int = 192
    micro_batches: int = 1
    lengths: tuple[int, ...] = (60, 33)
    within: float = 0.05
    """In the backward pass; everything else is within `ELSEWHERE`."""

    def recipe(self, ranks: int) -> Recipe:
        heads = self.hidden // 16
        small = SMALL if self.stage == 3 else SMALL[:1]
        return load_recipe(
            "tiny_base",
            [
                f"model.config.vocab_size={VOCABULARY}", f"model.config.hidden_size={self.hidden}",
                "model.config.head_dim=16", f"model.config.num_attention_heads={heads}",
                f"model.config.num_key_value_heads={heads // 2}", "model.config.num_hidden_layers=3",
                "model.config.intermediate_size=500", f"model.dtype={self.dtype}",
                f"deepspeed.config=zero{self.stage}_bf16", "training.micro_batch_bins=1",
                f"training.global_batch_bins={ranks * self.micro_batches}",
                *(option for word in self.more for option in (small if word == "small" else (word,))),
            ],
        )  # fmt: skip


CASES = (
    Case(2, "ntp", "fp32", ("small",)),
    Case(2, "bico", "fp32"),
    Case(2, "ntp", "bf16", (CHECKPOINTED,)),
    Case(2, "ntp", "fp32", (LORA,)),
    Case(2, "ntp", "fp32", ("small",), micro_batches=2),
    Case(3, "ntp", "fp32"),
    Case(3, "bico", "fp32", ("small",)),
    Case(3, "ntp", "bf16"),
    Case(3, "ntp", "fp32", (CHECKPOINTED, "small")),
    Case(3, "ntp", "fp32", (LORA, "small")),
    Case(3, "ntp", "fp32", ("small", TIED), hidden=128),
    Case(3, "ntp", "bf16", ("small",), micro_batches=2),
    # Nothing of the planner was fitted to these. Where more than 5 % is allowed, so far off is the backward pass with small
    # buckets: it is planned too large (with the tied head by adding the layer's most rows to its most gradients, which are
    # not there together), and too small with three micro-batches. The other tensors are not known yet.
    Case(2, "bico", "bf16", ("small", LORA, CHECKPOINTED), hidden=160, lengths=(150, 20, 71), within=0.06),
    Case(2, "ntp", "fp32", ("small", TIED), hidden=96, lengths=(300,), within=0.12),
    Case(2, "ntp", "bf16", ("small", CHECKPOINTED), hidden=224, micro_batches=3, within=0.07),
    Case(3, "bico", "bf16", (LORA, CHECKPOINTED), hidden=224, lengths=(100, 120)),
    Case(3, "bico", "bf16", ("small", LORA, CHECKPOINTED), hidden=160, lengths=(80, 90), within=0.06),
    Case(3, "bico", "fp32", ("small", "model.activation_checkpointing=2", DEEP), hidden=96),
    Case(3, "ntp", "fp32", (DEEP,), hidden=128, lengths=(7, 200)),
    Case(3, "ntp", "bf16", (HPZ,), hidden=128),
    Case(3, "ntp", "fp32", (HPZ, "small", CHECKPOINTED), hidden=160),
    Case(3, "ntp", "fp32", (OFFLOAD,), hidden=128),
    Case(3, "bico", "bf16", (OFFLOAD, "small", CHECKPOINTED), hidden=160),
)
QUICK = (0, 6, 9)
ALL = range(len(CASES))


def batch_of(case: Case, number: int) -> PackedBatch:
    rng = np.random.default_rng(number)
    documents = [
        Document(token_ids=rng.integers(1, VOCABULARY, n), source=0, id=number * 8 + i)
        for i, n in enumerate(case.lengths)
    ]
    return OBJECTIVES[case.objective].build(Documents.of(documents), BatchKey(seed=1, epoch=0))


def measure(case: Case, recipe: Recipe, ranks: int, memory: LiveMemory, folder: Path) -> list[int]:
    """Real steps, as `bico_ds.training.trainer` makes them; return what ZeRO-3 recorded: its modules, by their elements."""
    import deepspeed

    config = build_ds_config(
        recipe, world_size=ranks, hidden_size=case.hidden, on_cuda=False, run_folder=folder
    )
    batches = [batch_of(case, number) for number in range(case.micro_batches)]
    memory.restart()
    model = build_model(recipe.model, seed=1, ds_config=config, device="cpu")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=config,
        lr_scheduler=lambda optimizer: build_scheduler(recipe.schedule, optimizer, 1000),
    )
    for _ in range(STEPS):
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with memory.block("forward"):
                loss = engine(batch).loss
            with memory.block("backward"):
                engine.backward(loss, scale_wrt_gas=False)
            del loss
            with memory.block("update" if last else "between"):
                engine.step()
    if case.stage < 3:
        return []
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    order = coordinator._PartitionedParameterCoordinator__submodule_order
    return [sum(weight.ds_numel for weight in module.parameters(recurse=False)) for module in order]


def measure_on_ranks(rank: int, ranks: int, library: Path, folder: Path, numbers: Sequence[int]) -> None:
    """Leave, by case and part of a step, the bytes at rest before it and at its peak."""
    torch.set_num_threads(1)
    memory = LiveMemory(library)
    _leave_out_scratch(memory)
    for number in numbers:
        case = CASES[number]
        recorded = measure(case, case.recipe(ranks), ranks, memory, folder)
        (folder / f"recorded-{number}-{ranks}.json").write_text(json.dumps(recorded), encoding="utf-8")
        found = {
            name: [dataclasses.astuple(block) for block in blocks] for name, blocks in memory.blocks.items()
        }
        (folder / f"{number}-{ranks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _leave_out_scratch(memory: LiveMemory) -> None:
    """The head's products go to tensors that are there: what they allocate is oneDNN's scratch, at times a copy of a small
    weight in blocks. No plan has that; of larger weights it is a few megabytes at most.
    """
    product = torch.mm

    def mm(*inputs: Any, **options: Any) -> Any:
        assert options.keys() == {"out"}
        with memory.uncounted():
            return product(*inputs, **options)

    torch.mm = mm


def measured_on_ranks(folder: Path, numbers: Sequence[int], worlds: Sequence[int]) -> Path:
    """The folder with what ranks have measured, started once per number of ranks in `worlds`."""
    if refusal := native_refusal():
        pytest.skip(f"what is planned is the memory of the fused kernel, which {refusal}")
    library = build(folder)
    alone = [number for number in numbers if HPZ in CASES[number].more]  # a process makes hpZ's groups once
    together = [number for number in numbers if number not in alone]
    for ranks, group in product(worlds, (together, *([number] for number in alone))):
        run_on_ranks(measure_on_ranks, ranks, library, folder, group)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_on_ranks(tmp_path_factory.mktemp("measured"), QUICK, [2])


@pytest.fixture(scope="module")
def all_measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_on_ranks(tmp_path_factory.mktemp("all_measured"), ALL, [1, 2])


def rest_and_peaks(folder: Path, number: int, ranks: int) -> tuple[int, dict[str, int]]:
    """Of the ranks the one with the most, of the last steps the one with the least: a thread of gloo lets go of its tensors
    at times after the next ones are there."""
    rests: list[int] = []
    peaks: dict[str, int] = {}
    for rank in range(ranks):
        blocks = json.loads(Path(folder, f"{number}-{ranks}-{rank}.json").read_text(encoding="utf-8"))
        per_step = CASES[number].micro_batches
        starts = [before for before, _ in blocks["forward"][::per_step]][-MEASURED:]
        rests.append(min(starts))
        for name in ("forward", "backward", "update"):
            every = len(blocks[name]) // STEPS
            steps = [
                max(most for _, most in blocks[name][step * every : (step + 1) * every])
                for step in range(STEPS)
            ]
            growth = min(most - start for most, start in zip(steps[-MEASURED:], starts, strict=True))
            peaks[name] = max(growth, peaks.get(name, 0))
    return min(rests), {name: min(rests) + growth for name, growth in peaks.items()}


def micro_batch_of(case: Case) -> MicroBatch:
    batch = batch_of(case, 0)
    kept = int(batch.plan.cu_seqlens[-1])
    return MicroBatch(
        objective=case.objective, probability=1.0, mode=batch.plan.mode, documents=len(case.lengths),
        longest=max(case.lengths), tokens=sum(case.lengths), kept_rows=kept,
        live_rows=len(batch.input_ids) - kept, pairs=sum(n * (n + 1) / 2 for n in case.lengths),
        head_rows=len(batch.targets),
    )  # fmt: skip


def plan_of(case: Case, ranks: int) -> MemoryPlan:
    recipe = case.recipe(ranks)
    architecture = read_architecture(recipe.model)
    zero = read_zero(recipe, hidden_size=case.hidden, ranks=ranks, ranks_per_node=ranks, on_cuda=False)
    host = dataclasses.replace(DEVICES["h100-80g"], kind="cpu")
    deployment = Deployment(device=host, nodes=1, ranks_per_node=ranks, zero=zero)
    return device_memory(recipe, architecture, deployment, [micro_batch_of(case)])


def predicted_peaks(plan: MemoryPlan) -> Mapping[str, float]:
    peaks: dict[str, float] = {}
    for moment in plan.moments:
        part = PART_OF.get(moment.name, "backward")
        peaks[part] = max(peaks.get(part, 0.0), moment.bytes.high)
    return peaks


def check(folder: Path, ranks: int, number: int) -> None:
    case = CASES[number]
    rest, peaks = rest_and_peaks(folder, number, ranks)
    plan = plan_of(case, ranks)
    planned: dict[str, Any] = {"rest": total(plan.resident).high, **predicted_peaks(plan)}
    ratios = {name: planned[name] / size for name, size in {"rest": rest, **peaks}.items()}
    print(case, {name: round(ratio - 1, 4) for name, ratio in ratios.items()})
    for name, ratio in ratios.items():
        within = case.within if name == "backward" else ELSEWHERE
        assert ratio == pytest.approx(1.0, abs=within), f"{name} of {case} on {ranks} ranks: {ratios}"


@pytest.mark.parametrize("number", QUICK)
def test_planned_bytes_are_the_live_bytes_of_real_ranks(measured: Path, number: int) -> None:
    check(measured, 2, number)


@pytest.mark.parametrize("number", QUICK)
def test_what_a_run_is_refused_for_is_less_than_what_it_takes(measured: Path, number: int) -> None:
    """States between steps and kept activations: `bico_ds.cluster.preflight.fit`."""
    case = CASES[number]
    _, peaks = rest_and_peaks(measured, number, 2)
    recipe = case.recipe(2)
    kept = activation_memory(
        read_architecture(recipe.model), recipe.model, micro_batch_of(case), on_cuda=False
    )
    least = total((*plan_of(case, 2).resident, *kept.kept)).low
    assert least <= max(peaks.values())


@pytest.mark.parametrize("number", [number for number in QUICK if CASES[number].stage == 3])
def test_modules_are_visited_in_the_order_that_deepspeed_records(measured: Path, number: int) -> None:
    recipe = CASES[number].recipe(2)
    modules = modules_of(read_architecture(recipe.model), recipe.model.lora)
    order = visits(modules, recipe.model.activation_checkpointing)
    planned = [sum(p.elements for p in visit.module.parameters) for visit in order if visit.fetches]
    assert planned == json.loads((measured / f"recorded-{number}-2.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), product((1, 2), ALL))
def test_planned_bytes_are_the_live_bytes_of_real_ranks_in_all_cases(
    all_measured: Path, ranks: int, number: int
) -> None:
    check(all_measured, ranks, number)
