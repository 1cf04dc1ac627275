"""What the ranks of an optimizer step send each other and their hosts, and how long the links take.

What DeepSpeed 0.19.8 sends (`tests/distributed/test_planned_communication.py` counts it on real ranks):

- ZeRO-3 gathers weights for each pass that reads them, and reduce-scatters gradients in every micro-batch (ZeRO paper, arXiv
  1910.02054, section 7). Which weights are still there from an earlier pass is decided by `PartitionedParameterCoordinator`,
  whose rules `gathered_elements` replays. Small weights stay, and are gathered once after the step.
- ZeRO-2 all-reduces gradients in every micro-batch, although a rank keeps a part only (`use_multi_rank_bucket_allreduce` of
  runtime/zero/stage_1_and_2.py), and gathers the updated weights after the step.
- Frozen weights have no gradient. With hpZ (ZeRO++, arXiv 2306.10209, section 3.2) a weight is gathered from all ranks once
  after each update, and else from its group; a frozen one always from its group.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import ModelSpec, Recipe
from bico_ds.planner.architecture import Architecture, Linear
from bico_ds.planner.deployment import Deployment, Zero
from bico_ds.planner.ranges import Range

# Assumptions. Of a link's data-sheet bandwidth, what large collectives reach (measure yours: nccl-tests, or the pre-flight);
# the delay of each rank in a ring; bytes per second of a node's NVMe drives together.
LINK_EFFICIENCY = Range(0.5, 0.9)
HOP_SECONDS = Range(2e-6, 10e-6)
NVME_BANDWIDTH = Range(3e9, 25e9)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of transfer in an optimizer step: bytes that a rank sends, and seconds by the links it crosses."""

    name: str
    bytes: float
    seconds: Range
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter tensor as ZeRO-3 gathers it; `elements` of its full shape."""

    name: str
    elements: int
    trained: bool


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What of a recipe's model decides which modules run: the names with adapters (none: all weights are trained)."""

    adapted: frozenset[str]
    rank: int
    recompute_every: int

    @classmethod
    def of(cls, model: ModelSpec) -> _Passes:
        lora = model.lora
        return cls(
            adapted=frozenset(() if lora is None else lora.targets),
            rank=0 if lora is None else lora.rank,
            recompute_every=model.activation_checkpointing,
        )

    @property
    def all_trained(self) -> bool:
        return not self.adapted


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """A module's turn in a micro-batch: the weights that it needs, and those that are dropped after it whatever comes."""

    weights: tuple[Weight, ...] = ()
    dropped: tuple[Weight, ...] = ()


def transfers(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Transfer, ...]:
    """All transfers of one optimizer step of a rank, those between ranks first; none where there is nothing to send."""
    training = recipe.training
    accumulation = micro_batches_per_rank(
        training.global_batch_bins, training.micro_batch_bins, deployment.ranks
    )
    weight_bytes = 2 if recipe.model.dtype == "bf16" else 4
    between = _of_stage_3 if deployment.zero.stage == 3 else _of_stage_2
    found = [
        *between(recipe.model, architecture, deployment, accumulation, weight_bytes),
        *_of_offload(recipe.model, architecture, deployment, accumulation, weight_bytes),
    ]
    return tuple(transfer for transfer in found if transfer.bytes)


def _of_stage_2(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    zero, trained = deployment.zero, architecture.trained_parameters(model.lora)
    rounds = accumulation if zero.stage == 2 else 1
    return [
        _ring(
            deployment,
            "gradients, all-reduced",
            2 * rounds * trained * zero.communication_bytes,
            calls=rounds * trained / zero.reduce_bucket,
            how=f"{rounds} times all trained elements, there and back (DeepSpeed's stage_1_and_2.py)",
        ),
        _ring(
            deployment,
            "updated weights, gathered",
            trained * weight_bytes,
            calls=1,
            how="once after the step (ZeRO paper, section 7)",
        ),
    ]


def _of_stage_3(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    zero = deployment.zero
    per_micro_batch = gathered_elements(architecture, model, zero)
    weights = weights_of(architecture, model)
    small = sum(w.elements for w in weights if w.elements <= zero.persistence_threshold)
    trained = sum(w.elements for w in weights if w.trained)
    gathered = accumulation * per_micro_batch
    from_group = 0
    if zero.secondary_ranks is not None:
        updated = sum(w.elements for w in weights if w.trained and w.elements > zero.persistence_threshold)
        from_group = gathered - updated
    calls = len(weights) / max(1, sum(w.elements for w in weights))  # a bucket holds about one matrix
    how = f"{accumulation} times {per_micro_batch / 1e9:.3g} G elements (DeepSpeed's partitioned_param_coordinator.py)"
    return [
        _ring(
            deployment,
            "weights, gathered",
            (gathered - from_group) * weight_bytes,
            calls=calls * (gathered - from_group),
            how=how,
        ),
        _ring(
            deployment,
            "weights, gathered from the hpZ group",
            from_group * weight_bytes,
            calls=calls * from_group,
            group=zero.secondary_ranks,
            how=how,
        ),
        _ring(
            deployment, "small weights, gathered after the step", small * weight_bytes, calls=1, how="once"
        ),
        _ring(
            deployment,
            "gradients, reduce-scattered",
            accumulation * trained * zero.communication_bytes,
            calls=accumulation * trained / zero.reduce_bucket,
            how=f"{accumulation} times all trained elements (ZeRO paper, section 7)",
        ),
    ]


def _ring(
    deployment: Deployment, name: str, payload: float, *, calls: float, group: int | None = None, how: str
) -> Transfer:
    """A collective of `payload` bytes over the ring of all ranks, or of a `group` of neighbours.

    A rank sends (n - 1) / n of the payload (Patarasuk and Yuan, 2009; an all-reduce has twice the payload). NCCL builds a
    ring per network adapter, so that a node's ranks share what crosses its border; the slower kind of link decides.
    """
    ranks = deployment.ranks if group is None else group
    device, sent = deployment.device, payload * (ranks - 1) / ranks
    within = min(ranks, deployment.ranks_per_node)
    best = sent / device.link_bandwidth if within > 1 else 0.0
    if ranks > within:
        best = max(best, sent / within / device.network_bandwidth)
    hops = calls * (ranks - 1)
    seconds = Range(
        best / LINK_EFFICIENCY.high + hops * HOP_SECONDS.low,
        best / LINK_EFFICIENCY.low + hops * HOP_SECONDS.high,
    )
    return Transfer(name=name, bytes=sent, seconds=seconds, how=how)


def gather_all_weights(model: ModelSpec, architecture: Architecture, deployment: Deployment) -> Transfer:
    """All weights, gathered once from all ranks, module by module: what a partitioned model does for each new token."""
    size = architecture.parameters * (2 if model.dtype == "bf16" else 4)
    calls = len(weights_of(architecture, model))
    return _ring(deployment, "all weights, gathered", size, calls=calls, how="once")


def _of_offload(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    """Copies between a device and its host, and between host and NVMe drives, which a node's ranks share."""
    zero, device = deployment.zero, deployment.device
    trained = architecture.trained_parameters(model.lora) / deployment.ranks
    found = []
    if zero.offload_optimizer != "none":
        found += [
            _over_host_link(
                device.host_bandwidth,
                "gradients, between device and host",
                2 * accumulation * trained * zero.gradient_bytes,
                "accumulated on the device, kept on the host (DeepSpeed's stage3.py, partition_grads)",
            ),
            _over_host_link(
                device.host_bandwidth,
                "updated weights, from the host",
                trained * weight_bytes,
                "once after the step",
            ),
        ]
    if zero.offload_optimizer == "nvme":
        size = 32 * trained
        per_rank = NVME_BANDWIDTH.times(1 / deployment.ranks_per_node)
        how = "read: gradient, master weight, moments (16 bytes); written: the same (ZeRO-Infinity, arXiv 2104.07857)"
        seconds = Range(size / per_rank.high, size / per_rank.low)
        found.append(
            Transfer(name="optimizer, from and to NVMe drives", bytes=size, seconds=seconds, how=how)
        )
    if zero.offload_parameters != "none":
        gathered = accumulation * gathered_elements(architecture, model, zero) / deployment.ranks
        how = "a rank's part, before each gathering"
        found.append(
            _over_host_link(
                device.host_bandwidth, "partitioned weights, from the host", gathered * weight_bytes, how
            )
        )
    return found


def _over_host_link(bandwidth: float, name: str, size: float, how: str) -> Transfer:
    best = size / bandwidth
    seconds = Range(best / LINK_EFFICIENCY.high, best / LINK_EFFICIENCY.low)
    return Transfer(name=name, bytes=size, seconds=seconds, how=how)


def weights_of(architecture: Architecture, model: ModelSpec) -> list[Weight]:
    """All parameter tensors, adapters among them, each once."""
    visits = _forward(architecture, _Passes.of(model))
    return list({weight.name: weight for visit in visits for weight in visit.weights}.values())


def gathered_elements(architecture: Architecture, model: ModelSpec, zero: Zero) -> int:
    """Elements that ZeRO-3 gathers in one micro-batch, forward and backward, once the order of modules is known.

    The rules of DeepSpeed's `PartitionedParameterCoordinator`, in the order of its `fetch_sub_module` and
    `release_sub_module`: a module's missing weights are gathered, then a bucket of those that come next in the trace,
    while no more than `max_live_parameters` are there. After its turn a module's weights are dropped, unless the look ahead
    has passed their next use, or fewer than `max_reuse_distance` elements are read before it.

    Measured with small models on two ranks: exact, with adapters 0 to 6 % too few.
    """
    return _gathered(architecture, _Passes.of(model), zero)


@lru_cache(maxsize=256)
def _gathered(architecture: Architecture, passes: _Passes, zero: Zero) -> int:
    return _Coordinator(_trace(architecture, passes), zero).run()


class _Coordinator:
    """The state of a replay: which weights are there, and how far the look ahead has come."""

    def __init__(self, trace: list[_Visit], zero: Zero) -> None:
        self.trace, self.zero = trace, zero
        self.queue = deque((weight, step) for step, visit in enumerate(trace) for weight in visit.weights)
        self.looked_to: dict[str, int] = defaultdict(lambda: -1)
        self.there: set[str] = set()
        self.live = self.gathered = 0
        self.read_before = [0]
        for visit in trace:
            self.read_before.append(self.read_before[-1] + sum(w.elements for w in visit.weights))
        # Where a weight is used next, by the step at which it is used.
        self.next_use: dict[tuple[str, int], int] = {}
        seen: dict[str, int] = {}
        for step in reversed(range(len(trace))):
            for weight in trace[step].weights:
                if weight.name in seen:
                    self.next_use[weight.name, step] = seen[weight.name]
                seen[weight.name] = step

    def run(self) -> int:
        """Elements that were gathered."""
        for step, visit in enumerate(self.trace):
            self._gather(visit.weights)
            self._advance(visit.weights, step)
            self._gather(self._next_bucket())
            for weight in visit.weights:
                if self._may_go(weight, step):
                    self._drop(weight)
            for weight in visit.dropped:
                self._drop(weight)
        return self.gathered

    def _is_small(self, weight: Weight) -> bool:
        return weight.elements <= self.zero.persistence_threshold

    def _gather(self, weights: tuple[Weight, ...]) -> None:
        for weight in weights:
            if not self._is_small(weight) and weight.name not in self.there:
                self.there.add(weight.name)
                self.live += weight.elements
                self.gathered += weight.elements

    def _drop(self, weight: Weight) -> None:
        if weight.name in self.there:
            self.there.remove(weight.name)
            self.live -= weight.elements

    def _advance(self, weights: tuple[Weight, ...], step: int) -> None:
        """Past the weights of this step, where the look ahead has not passed them."""
        for _ in range(len({w.name for w in weights if self.looked_to[w.name] < step})):
            weight, used = self.queue.popleft()
            self.looked_to[weight.name] = used

    def _next_bucket(self) -> tuple[Weight, ...]:
        most = min(self.zero.max_live_parameters - self.live, self.zero.prefetch_bucket)
        bucket: dict[str, Weight] = {}
        while self.queue and sum(weight.elements for weight in bucket.values()) < most:
            weight, used = self.queue.popleft()
            self.looked_to[weight.name] = max(self.looked_to[weight.name], used)
            if not self._is_small(weight) and weight.name not in self.there:
                bucket[weight.name] = weight
        return tuple(bucket.values())

    def _may_go(self, weight: Weight, step: int) -> bool:
        if self.looked_to[weight.name] > step + 1:
            return False
        again = self.next_use.get((weight.name, step))
        return (
            again is None
            or self.read_before[again] - self.read_before[step + 1] >= self.zero.max_reuse_distance
        )


def _trace(architecture: Architecture, passes: _Passes) -> list[_Visit]:
    """The modules of a micro-batch in the order of their turns; modules without weights count, each looks ahead."""
    forward = _forward(architecture, passes)
    embedding, norm, head = forward[0], forward[-2], forward[-1]
    trace = [_Visit(), _Visit(), *forward, _Visit(), head, norm]
    for layer in reversed(range(architecture.layers)):
        backward = _layer_backward(architecture, passes, layer)
        every = passes.recompute_every
        if every and layer % every == 0:
            # The gradient of the first product asks for the layer's activations: they are computed within its turn.
            within = 2 + min(2, len(_products(architecture, passes, layer)[1][-1]))
            again = _layer_forward(architecture, passes, layer)
            if not passes.all_trained:
                # Frozen weights belong to the turn within which they were gathered, and go with it.
                frozen = tuple(w for visit in again for w in visit.weights if not w.trained)
                again[-1] = _Visit(weights=again[-1].weights, dropped=frozen)
            backward[within:within] = again
        trace += backward
    return [*trace, embedding] if passes.all_trained else trace


def _forward(architecture: Architecture, passes: _Passes) -> list[_Visit]:
    trained = passes.all_trained
    embedding = Weight(name="embedding", elements=architecture.embedding_parameters, trained=trained)
    head = Weight(name="head", elements=architecture.embedding_parameters, trained=trained)
    norm = Weight(name="norm", elements=architecture.hidden, trained=trained)
    layers = [
        visit for layer in range(architecture.layers) for visit in _layer_forward(architecture, passes, layer)
    ]
    last = embedding if architecture.tied_head else head
    return [_Visit(weights=(embedding,)), *layers, _Visit(weights=(norm,)), _Visit(weights=(last,))]


def _layer_forward(architecture: Architecture, passes: _Passes, layer: int) -> list[_Visit]:
    norm, second = _norms(architecture, passes, layer)
    attention, mlp = _products(architecture, passes, layer)
    visits = [
        _Visit(),
        norm,
        _Visit(),
        *(visit for product in attention for visit in product),
        second,
        _Visit(),
        *(visit for product in mlp for visit in product),
    ]
    return visits


def _layer_backward(architecture: Architecture, passes: _Passes, layer: int) -> list[_Visit]:
    """Mirrored; a module that holds others comes before them in both directions."""
    norm, second = _norms(architecture, passes, layer)
    attention, mlp = _products(architecture, passes, layer)
    visits = [
        _Visit(),
        _Visit(),
        *(visit for product in reversed(mlp) for visit in _mirrored(product)),
        second,
        _Visit(),
        *(visit for product in reversed(attention) for visit in _mirrored(product)),
        norm,
    ]
    if layer or passes.all_trained:
        return visits
    # Below the first adapters nothing is trained: no gradient asks for these weights.
    unread = {linear.name for linear in architecture.linears[:3]}
    return [
        v for v in visits[:-1] if not any(w.name.split(".")[1] in unread and not w.trained for w in v.weights)
    ]


def _mirrored(product: list[_Visit]) -> list[_Visit]:
    return product if len(product) == 1 else [product[0], *reversed(product[1:])]


def _norms(architecture: Architecture, passes: _Passes, layer: int) -> tuple[_Visit, _Visit]:
    first, second = (
        _Visit(
            weights=(
                Weight(
                    name=f"{layer}.{name}",
                    elements=architecture.norm_elements // 2,
                    trained=passes.all_trained,
                ),
            )
        )
        for name in ("input_norm", "attention_norm")
    )
    return first, second


def _products(
    architecture: Architecture, passes: _Passes, layer: int
) -> tuple[list[list[_Visit]], list[list[_Visit]]]:
    """Of attention and of the MLP: per linear layer its modules, in the order of the forward pass."""
    products = [_product(linear, passes, layer) for linear in architecture.linears]
    end = next(i for i, linear in enumerate(architecture.linears) if linear.name == "o_proj") + 1
    return products[:end], products[end:]


def _product(linear: Linear, passes: _Passes, layer: int) -> list[_Visit]:
    """One module, or with adapters peft's five: the wrapper, the frozen layer, the dropout, A and B."""
    name = f"{layer}.{linear.name}"
    weights = [Weight(name=name, elements=linear.weight_elements, trained=passes.all_trained)]
    if linear.bias:
        weights.append(Weight(name=f"{name}.bias", elements=linear.outputs, trained=passes.all_trained))
    own = _Visit(weights=tuple(weights))
    if linear.name not in passes.adapted:
        return [own]
    a = Weight(name=f"{name}.a", elements=passes.rank * linear.inputs, trained=True)
    b = Weight(name=f"{name}.b", elements=linear.outputs * passes.rank, trained=True)
    return [_Visit(), own, _Visit(), _Visit(weights=(a,)), _Visit(weights=(b,))]
