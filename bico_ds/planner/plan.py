"""The plan of a run: everything that the other modules find, for one recipe, one deployment and one set of texts."""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture, check_adapters, read_architecture
from bico_ds.planner.compute.shares import StepShares
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import Device
from bico_ds.planner.items import Item
from bico_ds.planner.memory import MemoryPlan, device_memory
from bico_ds.planner.ranges import Range
from bico_ds.planner.run_time import RunTime, run_time
from bico_ds.planner.step_time import StepTime, step_time
from bico_ds.planner.storage import disk, host_memory, nvme
from bico_ds.planner.workload import MicroBatch, Texts, micro_batches, steps_of_run

# Bytes per second of a shared file system, all nodes together: an assumption.
DISK_BANDWIDTH = Range(1e9, 20e9)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs on a deployment; `price` and `disk_bandwidth` as `make_plan` got them."""

    recipe: Recipe
    architecture: Architecture
    deployment: Deployment
    texts: Texts
    batches: tuple[MicroBatch, ...]
    memory: MemoryPlan
    host: tuple[Item, ...]
    nvme: tuple[Item, ...]
    disk: tuple[Item, ...]
    steps: tuple[StepTime, ...]
    run: RunTime
    price: float | None
    disk_bandwidth: Range

    @property
    def represented_per_second(self) -> Range:
        """Tokens of texts per second and device, over the steps of all objectives."""
        training = self.recipe.training
        micro_batch = sum(batch.probability * batch.tokens for batch in self.batches)
        step = training.global_batch_bins / training.micro_batch_bins * micro_batch
        tokens, seconds = step / self.deployment.ranks, self.run.mean_step_seconds
        return Range(tokens / seconds.high, tokens / seconds.low)

    def changed(self, recipe: Recipe, *, nodes: int | None = None, ranks_per_node: int | None = None) -> Plan:
        """The plan of a recipe for the same texts and devices, on so many of them. Raises as `make_plan` does."""
        return make_plan(
            recipe,
            self.deployment.device,
            nodes=nodes or self.deployment.nodes,
            ranks_per_node=ranks_per_node or self.deployment.ranks_per_node,
            texts=self.texts,
            price=self.price,
            disk_bandwidth=self.disk_bandwidth,
        )


def make_plan(
    recipe: Recipe,
    device: Device,
    *,
    nodes: int,
    ranks_per_node: int,
    texts: Texts,
    price: float | None = None,
    disk_bandwidth: Range = DISK_BANDWIDTH,
) -> Plan:
    """Plan a recipe on `nodes` nodes. `price` per device and hour; `disk_bandwidth` in bytes per second, of all nodes.

    Raises `UserError` for ranks that do not divide the batch, an architecture that cannot be read, adapters of layers that
    it does not have, and a DeepSpeed configuration that is not there or that nothing can be planned with.
    """
    architecture, ranks = read_architecture(recipe.model), nodes * ranks_per_node
    if recipe.model.lora is not None:
        check_adapters(architecture, recipe.model.lora)
    micro_batches_per_rank(recipe.training.global_batch_bins, recipe.training.micro_batch_bins, ranks)
    zero = read_zero(
        recipe,
        hidden_size=architecture.hidden,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        on_cuda=device.kind == "cuda",
    )
    deployment = Deployment(device=device, nodes=nodes, ranks_per_node=ranks_per_node, zero=zero)
    batches = StepShares(recipe=recipe).of_steps(micro_batches(recipe, texts))
    total_steps = steps_of_run(recipe, texts, batches)
    steps = tuple(step_time(recipe, architecture, deployment, batch) for batch in batches)
    return Plan(
        recipe=recipe,
        architecture=architecture,
        deployment=deployment,
        texts=texts,
        batches=batches,
        memory=device_memory(recipe, architecture, deployment, micro_batches(recipe, texts, fullest=True)),
        host=host_memory(recipe, architecture, deployment),
        nvme=nvme(recipe, architecture, deployment),
        disk=disk(recipe, architecture, zero, total_steps),
        steps=steps,
        run=run_time(
            recipe,
            architecture,
            deployment,
            total_steps,
            steps,
            price=price,
            disk_bandwidth=disk_bandwidth,
        ),
        price=price,
        disk_bandwidth=disk_bandwidth,
    )
