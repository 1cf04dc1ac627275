"""What a DeepSpeed configuration may hold, judged before anything begins.

DeepSpeed accepts unknown top-level keys in silence (seen with 0.19.8). Known keys that nothing reads on our way through
it, or that would work against the recipe, are refused, too. What DeepSpeed does refuse, it refuses when weights are built
and ranks wait, with a traceback; here it is a message before that, for all that its `DeepSpeedConfig` refuses on reading,
and for what its engine refuses later as far as the checks below know it: the optimizer's parameters, data types, the
kinds of single values, and what its ZeRO stages do not do together.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import BaseModel, ValidationError

from bico_ds.common.errors import UserError, did_you_mean

# What a recipe may set at the top level; `_REFUSED` has DeepSpeed's other keys.
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

# What the recipe says, and the key in which it says it. A value of its own here would win in silence, or be refused by
# DeepSpeed for not fitting the others.
OWNED = {
    "train_batch_size": "training.global_batch_bins",
    "train_micro_batch_size_per_gpu": "training.micro_batch_bins",
    "gradient_accumulation_steps": "training.global_batch_bins (it follows from that and the number of ranks)",
    "gradient_clipping": "training.max_grad_norm",
    "steps_per_print": "monitor.every_steps",
    "bf16.enabled": "model.dtype",
    "bf16.check_grad_overflow": "training.on_nonfinite",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}

_DTYPE = "set model.dtype (bf16 or fp32) instead"

# What DeepSpeed knows and a run of ours must not carry, with the reason: the code of 0.19.8 was read for each. Keys
# of another ZeRO stage are left alone, since one file serves several stages.
_REFUSED = {
    **dict.fromkeys(("fp16", "bfloat16", "amp", "torch_autocast"), _DTYPE),
    "scheduler": "set the recipe's schedule section instead",
    "gradient_allreduce_op": "losses are weighted for the mean over the ranks",
    "managed_gradient_accumulation": "the loop relies on DeepSpeed to count the micro-batches of a step",
    "dataloader_drop_last": "DeepSpeed loads no data here; the recipe's data section says what is loaded",
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
    "checkpoint.writer": "checkpoints have another writer; the recipe's checkpoint section says when it writes",
    "checkpoint.parallel_write": "only pipelines read it",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder, on a disk that all nodes share",
    "checkpoint.load_universal": "a resume sets it where the checkpoint needs it",
    "checkpoint.checkpoint_serialization": "the export and resumes map the files, which takes torch's zip format",
    "bf16.immediate_grad_update": "only pipelines and the bf16 optimizer of stage 1 read it",
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": "the model's buffers are the rotary frequencies, which must stay in fp32",
    "data_types.keep_in_fp32_modules": "it is about buffers, and they stay in fp32 without it",
    "optimizer.legacy_fusion": "only fp16 without ZeRO reads it",
    "optimizer.params.amsgrad": "checksums and conversions of checkpoints do not know its third moment",
    "optimizer.params.maximize": "it would climb the loss",
    "optimizer.params.capturable": "it is for CUDA graphs",
    "optimizer.params.differentiable": "it is for gradients of the update itself",
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

_UNPROVEN = "no test of this project trains, saves and resumes with it"


class _Proven(NamedTuple):
    """A section of DeepSpeed's: its model, and those of its keys that a configuration may set."""

    model: type[BaseModel]
    keys: tuple[str, ...]


# Of DeepSpeed's keys for ZeRO those with which `tests/distributed/test_ds_keys.py` does, and those of the shipped
# offloads. What the others do to a resume shows only there: the wrong weights, or an end in a traceback.
_PROVEN: dict[str, _Proven] = {
    "zero_optimization": _Proven(
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
    "zero_optimization.offload_optimizer": _Proven(
        DeepSpeedZeroOffloadOptimizerConfig, ("device", "pin_memory", "nvme_path", "buffer_count")
    ),
    "zero_optimization.offload_param": _Proven(
        DeepSpeedZeroOffloadParamConfig,
        ("device", "pin_memory", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
    ),
}
_FOR_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")

_MAPPINGS = ("bf16", "data_types", "zero_optimization", "optimizer", "aio", "flops_profiler", "checkpoint")

# Of values that DeepSpeed takes as they come: its defaults, whose kind they must have. "" is the top level.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
    },
    "aio": AIO_DEFAULT_DICT,
    "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
}

# The known keys of the mappings; most unknown ones DeepSpeed passes over in silence.
_SUB_KEYS = {
    "bf16": tuple(DeepSpeedBF16Config.model_fields),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("type", "params"),
    "checkpoint": ("tag_validation",),
    "aio": tuple(_DEFAULTS["aio"]),
    "flops_profiler": tuple(_DEFAULTS["flops_profiler"]),
}

# By the type of a default: which types a value may have, and in words.
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    type(None): ((str, type(None)), "a text"),
}

_GRADIENT_DTYPES = ("fp32", "bf16", "fp16")

_CHOOSE_ADAM = (
    "torch_adam",
    "adam_w_mode",
)  # parameters that DeepSpeed takes out, to choose among its Adams and torch's

_OPTIMIZERS = ("AdamW", "Adam")  # those whose parameters, offload and checksummed state the engine knows


def check_written(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are unknown, of the wrong kind, without effect, or the recipe's; `where` names the file."""
    _check_kinds(config, where)
    _check_keys(config, where)


def _check_kinds(config: dict[str, Any], where: str) -> None:
    for key in _MAPPINGS:
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"deepspeed: '{key}' must be a mapping of keys, found {config[key]!r} in {where}")
    params = config.get("optimizer", {}).get("params", "auto")
    if params != "auto" and not isinstance(params, dict):
        raise UserError(
            f"deepspeed: 'optimizer.params' must be a mapping of keys, found {params!r} in {where}"
        )


def _check_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are unknown, that would change nothing, and that the recipe owns."""
    for key, reason in _REFUSED.items():
        section, _, name = key.rpartition(".")
        holder = _at(config, section) if section else config
        if isinstance(holder, dict) and name in holder:
            raise UserError(f"deepspeed: remove '{key}' from {where}: {reason}")
    for name in sorted(set(config) - TOP_LEVEL_KEYS):
        hint = did_you_mean(name, TOP_LEVEL_KEYS)
        raise UserError(f"deepspeed: unknown top-level key '{name}'{hint} in {where}")
    for key, known in _SUB_KEYS.items():
        for name in sorted(set(config.get(key, {})) - set(known)):
            raise UserError(f"deepspeed: unknown key '{key}.{name}'{did_you_mean(name, known)} in {where}")
    for key, ours in OWNED.items():
        if (found := _at(config, key)) not in (None, "auto"):
            raise UserError(f"deepspeed: {key}={found!r} in {where}: set {ours} instead")
    _check_zero_keys(config, where)


def _check_zero_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are not proven, and those of NVMe without it. Unknown ones are left to DeepSpeed's own model."""
    to_nvme = []
    for section, proven in _PROVEN.items():
        given = _at(config, section)
        if not isinstance(given, dict):
            continue
        for name in sorted(set(given) & set(_names(proven.model)) - set(proven.keys)):
            raise UserError(f"deepspeed: remove '{section}.{name}' from {where}: {_UNPROVEN}")
        if given.get("device") == "nvme":
            to_nvme.append(section)
        elif idle := sorted(set(given) & set(_FOR_NVME)):
            raise UserError(f"deepspeed: remove '{section}.{idle[0]}' from {where}: it is for device=nvme")
    if "aio" in config and not to_nvme:
        raise UserError(f"deepspeed: 'aio' in {where} changes nothing without an offload to NVMe; remove it")


def _at(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def check_filled(filled: dict[str, Any], where: str) -> None:
    """Refuse what DeepSpeed itself would refuse, or not find, much later; and stages that a run cannot be saved with."""
    zero = _zero_config(filled, where)
    _check_values(filled, where)
    _check_stage(zero, filled, where)
    _check_optimizer(filled, where)
    _let_deepspeed_read(filled, where)
    wandb = filled.get("wandb", {})
    if wandb.get("enabled") and find_spec("wandb") is None:
        raise UserError(
            "monitor.wandb: the package 'wandb' is not installed here; install it, or set monitor.wandb=null"
        )


def _zero_config(filled: dict[str, Any], where: str) -> DeepSpeedZeroConfig:
    try:
        return DeepSpeedZeroConfig(**filled.get("zero_optimization", {}))
    except ValidationError as error:
        problems = (_zero_problem(problem) + f" in {where}" for problem in error.errors())
        raise UserError("\n".join(problems)) from None


def _check_stage(zero: DeepSpeedZeroConfig, filled: dict[str, Any], where: str) -> None:
    if zero.stage == 0:
        raise UserError(
            f"deepspeed: zero_optimization.stage: give 1, 2 or 3 in {where}; without ZeRO DeepSpeed neither looks "
            "for gradients that are not finite nor divides a state that a resume could check"
        )
    if zero.stage == 1 and filled["bf16"]["enabled"]:
        raise UserError(
            f"deepspeed: zero_optimization.stage: give 2 in {where}, or set model.dtype=fp32; in bf16 DeepSpeed takes "
            "another optimizer for stage 1, whose first checkpoint fails"
        )


def _check_values(filled: dict[str, Any], where: str) -> None:
    """Refuse values of the wrong kind that DeepSpeed would stumble over, or misunderstand, in the middle of its work."""
    for section, defaults in _DEFAULTS.items():
        given = filled.get(section, {}) if section else filled
        for name in sorted(set(defaults) & set(given)):
            default, value = defaults[name], given[name]
            kinds, wanted = _KINDS[type(default)]
            if type(value) not in kinds:
                key = f"{section}.{name}" if section else name
                raise UserError(f"deepspeed: {key}: must be {wanted}, found {value!r} in {where}")
    dtype = _at(filled, "data_types.grad_accum_dtype")
    if dtype not in (None, *_GRADIENT_DTYPES):
        raise UserError(
            f"deepspeed: data_types.grad_accum_dtype: '{dtype}' is not one of {', '.join(_GRADIENT_DTYPES)} in {where}"
        )


def _check_optimizer(filled: dict[str, Any], where: str) -> None:
    name, params = filled["optimizer"]["type"], filled["optimizer"]["params"]
    if str(name).lower() not in (known.lower() for known in _OPTIMIZERS):
        raise UserError(
            f"deepspeed: optimizer.type: '{name}' is not one of {', '.join(_OPTIMIZERS)}"
            f"{did_you_mean(str(name), _OPTIMIZERS)} in {where}"
        )
    known = set(_CHOOSE_ADAM)
    if params.get("torch_adam"):
        adam: type = torch.optim.AdamW
    elif _at(filled, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme"):
        adam = DeepSpeedCPUAdam
    else:
        adam = FusedAdam
    known |= set(signature(adam).parameters) - {"params", "model_params", "adamw_mode"}
    for param in sorted(set(params) - known):
        raise UserError(
            f"deepspeed: optimizer.params: {adam.__name__} has no '{param}'{did_you_mean(param, known)} in {where}"
        )
    if adam is torch.optim.AdamW:
        _try_torch_adam({key: value for key, value in params.items() if key not in _CHOOSE_ADAM}, where)
    bf16 = filled["bf16"]
    if (
        bf16.get("bf16_master_weights_and_grads")
        and not bf16.get("bf16_optimizer_states")
        and adam is not DeepSpeedCPUAdam
    ):
        raise UserError(
            "deepspeed: bf16.bf16_master_weights_and_grads: without bf16_optimizer_states it needs DeepSpeed's CPU Adam, "
            f"by zero_optimization.offload_optimizer.device=cpu, and not {adam.__name__}; remove it from {where}"
        )


def _try_torch_adam(params: dict[str, Any], where: str) -> None:
    """Refuse values that torch's optimizer refuses; on one parameter, as only it knows what goes with what."""
    try:
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"deepspeed: optimizer.params: {error} in {where}") from None


def _let_deepspeed_read(filled: dict[str, Any], where: str) -> None:
    """Let DeepSpeed read a copy, which starts nothing and takes milliseconds, and refuse what it refuses.

    Without `train_batch_size`, which it would hold against the ranks of this process, and `aio`, whose `use_gds` it
    would hold against this machine: another one may be meant.
    """
    config = {key: deepcopy(value) for key, value in filled.items() if key not in ("train_batch_size", "aio")}
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join((error.title, *map(str, problem["loc"])))
        raise UserError(
            f"deepspeed: {key}: {problem['msg']} (found {problem['input']!r}) in {where}"
        ) from None
    except Exception as error:  # of any kind: it asserts, and stumbles over types
        reason = str(error).partition("\n")[0]
        raise UserError(f"deepspeed: {reason} ({type(error).__name__} in DeepSpeed) in {where}") from None


def _zero_problem(problem: Any) -> str:
    key = ".".join(str(part) for part in ("zero_optimization", *problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"deepspeed: {key}: {problem['msg']} (found {problem['input']!r})"
    known = _names(DeepSpeedZeroConfig) if len(problem["loc"]) == 1 else []
    return f"deepspeed: unknown key '{key}'{did_you_mean(str(problem['loc'][-1]), known)}"


def _names(model: type[BaseModel]) -> list[str]:
    """The keys by which a configuration sets the model's fields."""
    return [info.alias or field for field, info in model.model_fields.items()]
