"""DeepSpeed's configuration: a file of ds_configs/, the recipe's overrides, and everything that the recipe computes.

DeepSpeed accepts unknown top-level keys in silence, and turns an unfilled `"auto"` into a default without a message
(both seen with 0.19.8). So ds_checks.py checks what is written and what comes out, and no `"auto"` leaves this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.deepspeed_file import bucket_sizes, written_ds_config
from bico_ds.config.layers import merge_mappings
from bico_ds.config.paths import WrittenPath, replace_paths
from bico_ds.config.schema import Recipe
from bico_ds.optim.table import kind_of
from bico_ds.runtime.ds_checks import check_filled, check_written
from bico_ds.runtime.ds_keys import OWNED


def merged_ds_config(recipe: Recipe) -> dict[str, Any]:
    """The file with the recipe's overrides, its keys known and of the right kind; `"auto"` still stands.

    What the recipe owns is always there: left out, DeepSpeed would take its own default. Raises `UserError`.
    """
    config = written_ds_config(recipe.deepspeed)
    check_written(config, _where(recipe))
    owned: dict[str, Any] = {key: "auto" for key in OWNED if "." not in key}
    optimizer = {"type": kind_of(recipe.optimizer).ds_types[0], "params": "auto"}
    owned |= {"bf16": {"enabled": "auto"}, "optimizer": optimizer}
    return merge_mappings(owned, config)


def _where(recipe: Recipe) -> str:
    return f"{recipe.deepspeed.config} or deepspeed.overrides"


def build_ds_config(
    recipe: Recipe,
    *,
    world_size: int,
    hidden_size: int,
    on_cuda: bool,
    run_folder: Path,
    ranks_per_node: int = 8,
    runs_here: bool = True,
) -> dict[str, Any]:
    """Return the complete configuration of one run; `hidden_size`, ranks and nodes size ZeRO's buckets.

    Its paths are those of this machine, or with `runs_here` False as they were written.

    Raises `UserError` for unknown keys, keys without effect, what DeepSpeed would refuse (as far as ds_checks.py checks
    it), stage 0, stage 1 in bf16, values that the recipe owns, an `auto` that nothing fills, optimizers that
    `optim/table.py` does not have, a monitor that is not installed, paths that cannot be expanded here, and batch sizes
    or nodes (hpZ) that do not divide.
    """
    config = replace_paths(merged_ds_config(recipe), WrittenPath.expanded if runs_here else str)
    hpz = config.get("zero_optimization", {}).get("zero_hpz_partition_size")
    _check_second_partitions(hpz, world_size, ranks_per_node, _where(recipe))
    computed = _computed(recipe, world_size, hidden_size, on_cuda, run_folder, ranks_per_node)
    if isinstance(given := config["optimizer"]["params"], dict):
        computed["optimizer.params"].update({key: value for key, value in given.items() if value != "auto"})
        config["optimizer"]["params"] = "auto"
    filled = _fill(config, computed, ())
    filled.update(_monitors(recipe, run_folder))
    # On by default: for its log, which is off, it waits for the whole device twice per micro-batch.
    filled["timers"] = {"throughput": {"enabled": False}}
    check_filled(filled, _where(recipe))
    left = list(_autos(filled, ()))
    assert not left, f"no value computed for {left}"
    return filled


def _check_second_partitions(hpz: Any, world_size: int, ranks_per_node: int, where: str) -> None:
    """Refuse groups of hpZ, as written or (`"auto"`) the nodes, into which the ranks cannot be divided."""
    size = ranks_per_node if hpz == "auto" else hpz
    if not isinstance(size, int) or size < 1 or world_size % min(size, world_size) == 0:
        return
    if hpz == "auto":
        raise UserError(
            f"deepspeed: zero_hpz_partition_size: {world_size} ranks are no whole number of nodes of {ranks_per_node}; "
            "start as many ranks on every node, or set deepspeed.overrides.zero_optimization.zero_hpz_partition_size"
        )
    raise UserError(
        f"deepspeed: zero_optimization.zero_hpz_partition_size: {world_size} ranks cannot be divided into groups of "
        f"{size}, in {where}"
    )


def _computed(
    recipe: Recipe, world_size: int, hidden: int, on_cuda: bool, run_folder: Path, ranks_per_node: int
) -> dict[str, Any]:
    """The value of every `auto`, by dotted key."""
    training = recipe.training
    accumulation = micro_batches_per_rank(training.global_batch_bins, training.micro_batch_bins, world_size)
    sizes = bucket_sizes(hidden, ranks=world_size, ranks_per_node=ranks_per_node)
    return {
        "train_batch_size": training.global_batch_bins,
        "train_micro_batch_size_per_gpu": training.micro_batch_bins,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": 2**31 - 1,  # our console prints the steps
        "bf16.enabled": recipe.model.dtype == "bf16",
        **{f"zero_optimization.{key}": size for key, size in sizes.items()},
        # A second stream is worth it on CUDA; on CPU, over gloo, there is none.
        "zero_optimization.overlap_comm": on_cuda,
        "zero_optimization.zero_hpz_partition_size": min(ranks_per_node, world_size),
        "zero_optimization.offload_optimizer.pin_memory": on_cuda,
        "zero_optimization.offload_optimizer.nvme_path": str(run_folder / "nvme"),
        "zero_optimization.offload_param.pin_memory": on_cuda,
        "optimizer.params": kind_of(recipe.optimizer).ds_parameters(recipe.optimizer, on_cuda=on_cuda),
    }


def _monitors(recipe: Recipe, run_folder: Path) -> dict[str, Any]:
    monitors: dict[str, Any] = {}
    if recipe.monitor.csv:
        monitors["csv_monitor"] = {
            "enabled": True,
            "output_path": str(run_folder / "csv"),
            "job_name": recipe.name,
        }
    if recipe.monitor.wandb is not None:
        wandb = recipe.monitor.wandb
        monitors["wandb"] = {
            "enabled": True,
            "project": wandb.project,
            "team": wandb.team,
            "group": wandb.group,
        }
    return monitors


def _fill(value: Any, computed: dict[str, Any], path: tuple[str, ...]) -> Any:
    if value == "auto":
        key = ".".join(path)
        if key not in computed:
            raise UserError(f"deepspeed: no rule fills '{key}': \"auto\"; give a value")
        return computed[key]
    if isinstance(value, dict):
        return {key: _fill(inner, computed, (*path, key)) for key, inner in value.items()}
    return value


def _autos(value: Any, path: tuple[str, ...]) -> list[str]:
    if value == "auto":
        return [".".join(path)]
    if isinstance(value, dict):
        return [key for name, inner in value.items() for key in _autos(inner, (*path, name))]
    return []
