"""Plan memory, time and money of a recipe, before a GPU is rented.

    bico-ds plan --recipe llama70b_bico --nodes 8 --gpus-per-node 8 --gpu h100-80g --price 2.5
    bico-ds plan --recipe llama3_8b_bico --set training.micro_batch_bins=2 --json

Needs no GPU, no weights (where the recipe has model.config) and no data. Whether it fits, item by item; FLOPs, time and
cost as ranges; other node counts and DeepSpeed configurations beside it. A plan that does not fit is an answer, too: exit
code 0. 2: wrong usage or input.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from rich.console import Console

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import text_without_secrets
from bico_ds.config.arguments import add_recipe_options, path_text, positive, positive_number, token_count
from bico_ds.config.load import load_recipe
from bico_ds.config.paths import LocalPath
from bico_ds.config.schema import Recipe
from bico_ds.data.planned_texts import texts_of
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.decisions import decide
from bico_ds.planner.deployment import spread
from bico_ds.planner.devices import DEVICES, Device, find_device
from bico_ds.planner.plan import DISK_BANDWIDTH, make_plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.as_json import plan_as_json
from bico_ds.planner.report.text import print_plan
from bico_ds.planner.workload import Texts, assumed_texts

WIDTH = 100
_GIGABIT, _GIGABYTE = 1e9 / 8, 1e9


def add_options(parser: ArgumentParser) -> None:
    add_recipe_options(parser)
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--nodes", metavar="N", type=positive, help="nodes (default: as many as the recipe's ranks fill)"
    )
    where.add_argument(
        "--gpus-per-node",
        metavar="N",
        type=positive,
        help="GPUs of each node (default: at most as many as is usual)",
    )
    where.add_argument(
        "--gpu", metavar="NAME|PATH", type=path_text,
        help=f"{', '.join(DEVICES)}, or a YAML file with the fields of Device (default: the recipe's distributed.gpu)",
    )  # fmt: skip
    where.add_argument(
        "--network-gbit", metavar="N", type=positive_number,
        help="gigabits per second that a GPU has to other nodes, each way (400: one InfiniBand NDR port)",
    )  # fmt: skip
    where.add_argument(
        "--link-gbyte", metavar="N", type=positive_number,
        help="gigabytes per second that a GPU has to those of its node, each way (450: NVLink of an H100)",
    )  # fmt: skip
    where.add_argument(
        "--disk-gbyte", metavar="N", type=positive_number,
        help="gigabytes per second that all nodes together write to the disk of the checkpoints",
    )  # fmt: skip
    where.add_argument(
        "--price", metavar="P", type=positive_number, help="of one GPU and hour, in any currency"
    )
    texts = parser.add_argument_group("what is read, where the recipe's data are not prepared here")
    texts.add_argument("--text-length", metavar="N", type=positive, help="tokens of a document")
    texts.add_argument("--epoch-tokens", metavar="N", type=token_count, help="tokens of a data epoch")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object; bico_ds/planner/report/as_json.py lists its keys",
    )


def run(options: Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    device = planned_device(recipe, options)
    nodes, ranks_per_node = planned_nodes(recipe, device, options)
    plan = make_plan(
        recipe,
        device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        texts=planned_texts(recipe, options),
        price=options.price,
        disk_bandwidth=DISK_BANDWIDTH
        if options.disk_gbyte is None
        else Range.exactly(options.disk_gbyte * _GIGABYTE),
    )
    decisions, notes = decide(plan), model_notes(recipe)
    if options.json:
        print(json.dumps(plan_as_json(plan, decisions, notes)))
    else:
        width = None if sys.stdout.isatty() else WIDTH
        print_plan(plan, decisions, notes, Console(width=width, markup=False, highlight=False))


def planned_device(recipe: Recipe, options: Namespace) -> Device:
    """The GPU that is meant, its links as given. Raises `UserError` where none is named, or an unknown one."""
    if recipe.model.attention_backend == "cpu-flash":
        raise UserError(
            "model.attention_backend: cpu-flash runs on CPUs alone, and a plan is for GPUs; "
            "set model.attention_backend=auto"
        )
    written = recipe.distributed.gpu if options.gpu is None else LocalPath(options.gpu, where="--gpu")
    if written is None:
        raise UserError(
            f"which GPU? Give --gpu ({', '.join(DEVICES)}, or a YAML file), or the recipe's distributed.gpu"
        )
    given = {
        "network_bandwidth": (options.network_gbit, _GIGABIT),
        "link_bandwidth": (options.link_gbyte, _GIGABYTE),
    }
    links = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    device = find_device(written)
    source = f"{device.source}; but links as they are given" if links else device.source
    return replace(device, source=source, **links)


def planned_nodes(recipe: Recipe, device: Device, options: Namespace) -> tuple[int, int]:
    """Nodes and ranks of each: as given, else of the recipe's ranks, or full nodes; of a recipe for any number, one node.

    Raises `UserError` where the recipe's ranks do not fill nodes of so many GPUs.
    """
    nodes, per_node, ranks = options.nodes, options.gpus_per_node, recipe.distributed.world_size
    if ranks is None:
        micro_batches = recipe.training.global_batch_bins // recipe.training.micro_batch_bins
        return nodes or 1, per_node or spread(micro_batches, device.per_node)[1]
    if nodes is not None:
        fills = ranks % nodes == 0 and ranks // nodes <= device.per_node
        return nodes, per_node or (ranks // nodes if fills else device.per_node)
    if per_node is None:
        return spread(ranks, device.per_node)
    if ranks % per_node:
        raise UserError(
            f"--gpus-per-node {per_node}: the recipe's {ranks} ranks (distributed.world_size) do not fill nodes of "
            f"{per_node}; give --nodes too"
        )
    return ranks // per_node, per_node


def planned_texts(recipe: Recipe, options: Namespace) -> Texts:
    """As given by options, else what is known of the recipe's sources."""
    if options.text_length is None and options.epoch_tokens is None:
        return texts_of(recipe)
    return assumed_texts(recipe, length=options.text_length, tokens=options.epoch_tokens)


def model_notes(recipe: Recipe) -> list[str]:
    """Where the shapes come from, if not from the model that the recipe names."""
    if recipe.model.path is None or read_architecture(recipe.model).source != "model.config":
        return []
    path = text_without_secrets(str(recipe.model.path))
    return [f"model.path '{path}' is not on this machine; planned from model.config alone"]


main = Command(description=__doc__, add_options=add_options, run=run, only_shows=lambda options: True)


if __name__ == "__main__":
    main.start()
