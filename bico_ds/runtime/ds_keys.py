"""What the keys of a DeepSpeed configuration mean here: the tables by which ds_checks.py accepts or refuses them."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import BaseModel

from bico_ds.config.bounds import Bound
from bico_ds.optim.table import OPTIMIZERS

# What a recipe may set at the top level; `REFUSED` has DeepSpeed's other keys.
TOP_LEVEL_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "bf16",
        "data_types",
        "communication_data_type",
        "zero_optimization",
        "optimizer",
        "aio",
        "wall_clock_breakdown",
        "memory_breakdown",
        "flops_profiler",
        "checkpoint",
    }
)

# What the recipe sets, and by which key. A value in the DeepSpeed configuration would win in silence, or be refused by
# DeepSpeed for not fitting the others.
OWNED = {
    "train_batch_size": "training.global_batch_bins",
    "train_micro_batch_size_per_gpu": "training.micro_batch_bins",
    "gradient_accumulation_steps": "training.global_batch_bins (it follows from that and the number of ranks)",
    "gradient_clipping": "training.max_grad_norm",
    "steps_per_print": "monitor.every_steps",
    "bf16.enabled": "model.dtype",
    "bf16.check_grad_overflow": "training.on_nonfinite",
    **{f"optimizer.params.{k}": f"optimizer.{k}" for kind in OPTIMIZERS for k in kind.spec.model_fields},
}

_DTYPE = "set model.dtype (bf16 or fp32) instead"

# What DeepSpeed knows and a run of ours must not carry, with the reason: the code of 0.19.8 was read for each. Keys
# of another ZeRO stage are left alone, since one file serves several stages.
REFUSED = {
    **dict.fromkeys(("fp16", "bfloat16", "amp", "torch_autocast"), _DTYPE),
    "scheduler": "set the recipe's schedule section instead",
    "gradient_allreduce_op": "losses are weighted for the mean over the ranks",
    "managed_gradient_accumulation": "the loop relies on DeepSpeed to count the micro-batches of a step",
    "dataloader_drop_last": "DeepSpeed loads no data here; the recipe's data section lists what is loaded",
    "disable_python_gc": "Python's garbage collection stays on",
    "disable_allgather": "nothing in DeepSpeed follows it",
    "vocabulary_size": "DeepSpeed only logs a warning by it",
    "timers": "they are for DeepSpeed's log, which is off",
    "log_level": "DeepSpeed's log is off but for warnings",
    **dict.fromkeys(
        (
            "autotuning",
            "compile",
            "compression_training",
            "curriculum_learning",
            "data_efficiency",
            "datastates_ckpt",
            "eigenvalue",
            "elasticity",
            "expert_parallel",
            "graph_harvesting",
            "hybrid_engine",
            "nebula",
            "pipeline",
            "progressive_layer_drop",
            "quantize_training",
            "sequence_parallel_size",
            "sparse_attention",
            "sparse_gradients",
            "tensor_parallel",
            "use_data_before_expert_parallelism",
            "weight_quantization",
        ),
        "that part of DeepSpeed is not used here",
    ),
    "activation_checkpointing": "DeepSpeed's own is never called; set model.activation_checkpointing instead",
    "tensorboard": "set monitor.tensorboard instead",
    "csv_monitor": "set monitor.csv instead",
    "wandb": "set monitor.wandb instead",
    "comet": "the recipe's monitor section has csv, tensorboard and wandb",
    "comms_logger": "nothing would print what it collects",
    "dump_state": "DeepSpeed writes it to its log, which is off",
    "seq_parallel_communication_data_type": "there is no sequence parallelism; set communication_data_type instead",
    "zero_allow_untested_optimizer": "AdamW and Adam are among the tested ones",
    "zero_force_ds_cpu_optimizer": "it is for optimizers that are built outside DeepSpeed",
    "checkpoint.writer": "checkpoints have another writer; the recipe's checkpoint section sets when it writes",
    "checkpoint.parallel_write": "only pipelines read it",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder, on a disk that all nodes share",
    "checkpoint.load_universal": "a resume sets it where the checkpoint needs it",
    "checkpoint.checkpoint_serialization": "the export and resumes map the files, which takes torch's zip format",
    "bf16.immediate_grad_update": "only pipelines and the bf16 optimizer of stage 1 read it",
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": "the model's buffers are the rotary frequencies, which must stay in fp32",
    "data_types.keep_in_fp32_modules": "it is about buffers, and they stay in fp32 without it",
    "optimizer.legacy_fusion": "only fp16 without ZeRO reads it",
    **{f"optimizer.params.{key}": why for kind in OPTIMIZERS for key, why in kind.refused.items()},
    "prescale_gradients": "it keeps fp16 gradients from overflowing; ours are summed in fp32, or bf16",
    "gradient_predivide_factor": "stage 3 divides by it and does not multiply back",
    "zero_optimization.round_robin_gradients": "DeepSpeed's map of weights to masters does not follow it, and a resume "
    "with another value would mix them up",
    "zero_optimization.elastic_checkpoint": "such a checkpoint cannot be resumed; ours are for any number of ranks",
    "zero_optimization.load_from_fp32_weights": "a resume needs the fp32 masters",
    "zero_optimization.allgather_partitions": "DeepSpeed reads it nowhere",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed reads it nowhere; set offload_optimizer.pin_memory instead",
    "zero_optimization.cpu_offload": "DeepSpeed has deprecated it; set offload_optimizer.device=cpu instead",
    "zero_optimization.cpu_offload_param": "DeepSpeed has deprecated it; set offload_param.device=cpu instead",
    "zero_optimization.compute_grad_norm": "the norm is printed, and clipping needs it",
    "zero_optimization.legacy_stage1": "this DeepSpeed no longer has it",
    "zero_optimization.memory_efficient_linear": "only DeepSpeed's own way to build a model reads it",
    "zero_optimization.override_module_apply": "only DeepSpeed's own way to build a model reads it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it is for the optimizer Muon",
    "zero_optimization.zenflow": "it sets the accumulation of gradients by itself, against training.global_batch_bins",
    "zero_optimization.gather_16bit_weights_on_model_save": "set checkpoint.export instead",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "set checkpoint.export instead",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "set checkpoint.export instead",
}

UNPROVEN = "no test of this project trains, saves and resumes with it"


class ProvenSection(NamedTuple):
    """A section of DeepSpeed's: its model, and those of its keys that a configuration may set."""

    model: type[BaseModel]
    keys: tuple[str, ...]


# DeepSpeed's keys for ZeRO with which `tests/distributed/test_ds_keys.py` trains, saves and resumes, and those of the
# shipped offloads. What the others do to a resume shows only there: the wrong weights, or an end in a traceback.
PROVEN: dict[str, ProvenSection] = {
    "zero_optimization": ProvenSection(
        DeepSpeedZeroConfig,
        (
            "stage",
            "contiguous_gradients",
            "overlap_comm",
            "reduce_scatter",
            "reduce_bucket_size",
            "allgather_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "ignore_unused_parameters",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "zero_hpz_partition_size",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "offload_optimizer",
            "offload_param",
        ),
    ),
    "zero_optimization.offload_optimizer": ProvenSection(
        DeepSpeedZeroOffloadOptimizerConfig, ("device", "pin_memory", "nvme_path", "buffer_count")
    ),
    "zero_optimization.offload_param": ProvenSection(
        DeepSpeedZeroOffloadParamConfig,
        ("device", "pin_memory", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
    ),
}
# Of the numbers in these sections.
COUNT = Bound(least=0, most=2**63 - 1, why="it counts parameters, buffers or ranks")
BOUNDS = {
    "zero_optimization.stage": Bound(least=0, most=3, why="ZeRO has no other stages"),
    "zero_optimization.reduce_bucket_size": Bound(
        least=1, most=10**10, why="a buffer of so many numbers is allocated"
    ),
    "zero_optimization.offload_param.buffer_size": Bound(
        least=1, most=10**10, why="so many numbers are allocated"
    ),
    "zero_optimization.offload_param.buffer_count": Bound(
        least=1, most=10**5, why="so many buffers are allocated"
    ),
    "zero_optimization.offload_optimizer.buffer_count": Bound(
        least=1, most=10**5, why="so many buffers are allocated"
    ),
}
FOR_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")

MAPPINGS = ("bf16", "data_types", "zero_optimization", "optimizer", "aio", "flops_profiler", "checkpoint")

# Of values that DeepSpeed takes as they come: its defaults, whose kind they must have. "" is the top level.
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
    },
    "aio": AIO_DEFAULT_DICT,
    "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
}

# The known keys of the mappings; most unknown ones DeepSpeed passes over in silence.
SUB_KEYS = {
    "bf16": tuple(DeepSpeedBF16Config.model_fields),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("type", "params"),
    "checkpoint": ("tag_validation",),
    "aio": tuple(DEFAULTS["aio"]),
    "flops_profiler": tuple(DEFAULTS["flops_profiler"]),
}

# By the type of a default: which types a value may have, and in words.
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    type(None): ((str, type(None)), "a text"),
}

# Not fp16: small gradients would become 0 there in silence, and nothing scales the loss.
GRADIENT_DTYPES = ("fp32", "bf16")
