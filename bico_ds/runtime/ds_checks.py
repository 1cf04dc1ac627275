"""What a DeepSpeed configuration may hold, checked before anything begins; ds_keys.py has the tables.

DeepSpeed accepts unknown top-level keys in silence (seen with 0.19.8). Known keys that nothing reads on our way through
it, or that would work against the recipe, are refused, too. What DeepSpeed does refuse, it refuses when weights are built
and ranks wait, with a traceback. Here it is a message before that: for all that its `DeepSpeedConfig` refuses on reading,
and for what its engine refuses later, as far as the checks below know it (the optimizer's parameters, data types, the
types of single values, and what its ZeRO stages do not support together).
"""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.optim.table import kind_named
from bico_ds.runtime.ds_keys import (
    BOUNDS,
    COUNT,
    DEFAULTS,
    FOR_NVME,
    GRADIENT_DTYPES,
    KINDS,
    MAPPINGS,
    OWNED,
    PROVEN,
    REFUSED,
    SUB_KEYS,
    TOP_LEVEL_KEYS,
    UNPROVEN,
)


def check_written(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are unknown, of the wrong kind, without effect, or the recipe's; `where` names the file."""
    _check_kinds(config, where)
    _check_keys(config, where)


def _check_kinds(config: dict[str, Any], where: str) -> None:
    for key in MAPPINGS:
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"deepspeed: '{key}' must be a mapping of keys, found {config[key]!r} in {where}")
    params = config.get("optimizer", {}).get("params", "auto")
    if params != "auto" and not isinstance(params, dict):
        raise UserError(
            f"deepspeed: 'optimizer.params' must be a mapping of keys, found {params!r} in {where}"
        )


def _check_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are unknown, that would change nothing, and that the recipe owns."""
    for key, reason in REFUSED.items():
        section, _, name = key.rpartition(".")
        holder = _at(config, section) if section else config
        if isinstance(holder, dict) and name in holder:
            raise UserError(f"deepspeed: remove '{key}' from {where}: {reason}")
    for name in sorted(set(config) - TOP_LEVEL_KEYS):
        hint = did_you_mean(name, TOP_LEVEL_KEYS)
        raise UserError(f"deepspeed: unknown top-level key '{name}'{hint} in {where}")
    for key, known in SUB_KEYS.items():
        for name in sorted(set(config.get(key, {})) - set(known)):
            raise UserError(f"deepspeed: unknown key '{key}.{name}'{did_you_mean(name, known)} in {where}")
    for key, ours in OWNED.items():
        if (found := _at(config, key)) not in (None, "auto"):
            raise UserError(f"deepspeed: {key}={found!r} in {where}: set {ours} instead")
    _check_zero_keys(config, where)


def _check_zero_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys that are not proven, and those of NVMe without it. Unknown ones are left to DeepSpeed's own model."""
    to_nvme = []
    for section, proven in PROVEN.items():
        given = _at(config, section)
        if not isinstance(given, dict):
            continue
        for name in sorted(set(given) & set(_names(proven.model)) - set(proven.keys)):
            raise UserError(f"deepspeed: remove '{section}.{name}' from {where}: {UNPROVEN}")
        if given.get("device") == "nvme":
            to_nvme.append(section)
        elif idle := sorted(set(given) & set(FOR_NVME)):
            raise UserError(f"deepspeed: remove '{section}.{idle[0]}' from {where}: it is for device=nvme")
    if "aio" in config and not to_nvme:
        raise UserError(f"deepspeed: 'aio' in {where} changes nothing without an offload to NVMe; remove it")


def _at(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def check_filled(filled: dict[str, Any], where: str) -> None:
    """Refuse what DeepSpeed itself would refuse, or not find, much later; and stages that a run cannot be saved with."""
    _check_numbers(filled, where)
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


def _check_numbers(filled: dict[str, Any], where: str) -> None:
    """Refuse ZeRO's numbers that are none, which its own models would convert, and those that no machine can hold."""
    for section, proven in PROVEN.items():
        given = _at(filled, section)
        for name in sorted(set(given if isinstance(given, dict) else ()) & set(proven.keys)):
            field = next(f for n, f in proven.model.model_fields.items() if name in (n, f.alias))
            if not isinstance(field.default, int) or isinstance(field.default, bool) or given[name] is None:
                continue
            bound = BOUNDS.get(f"{section}.{name}", COUNT)
            if (problem := bound.problem(given[name])) is not None:
                raise UserError(f"deepspeed: {section}.{name}: {problem} in {where}")


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
    for section, defaults in DEFAULTS.items():
        given = filled.get(section, {}) if section else filled
        for name in sorted(set(defaults) & set(given)):
            default, value = defaults[name], given[name]
            kinds, wanted = KINDS[type(default)]
            if type(value) not in kinds:
                key = f"{section}.{name}" if section else name
                raise UserError(f"deepspeed: {key}: must be {wanted}, found {value!r} in {where}")
    dtypes = {key: _at(filled, key) for key in ("data_types.grad_accum_dtype", "communication_data_type")}
    if isinstance(written := dtypes["communication_data_type"], str):
        dtypes["communication_data_type"] = written.lower()  # as DeepSpeed reads it
    for key, dtype in dtypes.items():
        if dtype not in (None, *GRADIENT_DTYPES):
            raise UserError(
                f"deepspeed: {key}: {dtype!r} is not one of {', '.join(GRADIENT_DTYPES)} in {where}"
            )
    gathered = _at(filled, "zero_optimization.allgather_bucket_size")
    if _at(filled, "zero_optimization.stage") in (1, 2) and gathered is not None and gathered % 2:
        raise UserError(
            f"deepspeed: zero_optimization.allgather_bucket_size: must be even, found {gathered!r}: stages 1 and 2 "
            f"align what they gather, in {where}"
        )


def _check_optimizer(filled: dict[str, Any], where: str) -> None:
    offloaded = _at(filled, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    kind_named(str(filled["optimizer"]["type"]), where).check(filled, offloaded=offloaded, where=where)


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
