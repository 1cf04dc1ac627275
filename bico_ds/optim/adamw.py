"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): all that this package knows of it."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.sections.optimizer import OptimizerSpec

# Parameters that DeepSpeed takes out of `optimizer.params`, to choose among its Adams and torch's.
_CHOOSE_ADAM = ("torch_adam", "adam_w_mode")


class AdamW:
    """An `OptimizerKind`. On CUDA DeepSpeed's fused one runs, on CPUs torch's, under an offload DeepSpeed's CPU Adam."""

    spec = OptimizerSpec
    classes = (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
    # "Adam" is AdamW, too, unless adam_w_mode is false.
    ds_types = ("AdamW", "Adam")
    refused: ClassVar[dict[str, str]] = {
        "amsgrad": "checksums and conversions of checkpoints do not know its third moment",
        "maximize": "it would climb the loss",
        "capturable": "it is for CUDA graphs",
        "differentiable": "it is for gradients of the update itself",
    }

    def hyperparameters(self, spec: OptimizerSpec) -> dict[str, Any]:
        return {
            "lr": spec.lr,
            "betas": list(spec.betas),
            "eps": spec.eps,
            "weight_decay": spec.weight_decay,
        }

    def ds_parameters(self, spec: OptimizerSpec, *, on_cuda: bool) -> dict[str, Any]:
        # DeepSpeed's FusedAdam is a CUDA kernel. Torch's fused one needs no temporaries of the parameters' size.
        chosen = {} if on_cuda else {"torch_adam": True, "fused": True}
        return self.hyperparameters(spec) | chosen

    def check(self, filled: dict[str, Any], *, offloaded: bool, where: str) -> None:
        params = filled["optimizer"]["params"]
        adam = _implementation(params, offloaded)
        known = {*_CHOOSE_ADAM, *signature(adam).parameters} - {"params", "model_params", "adamw_mode"}
        for param in sorted(set(params) - known):
            raise UserError(
                f"deepspeed: optimizer.params: {adam.__name__} has no '{param}'{did_you_mean(param, known)} in {where}"
            )
        if adam is torch.optim.AdamW:
            _try_torch_adam({key: value for key, value in params.items() if key not in _CHOOSE_ADAM}, where)
        if adam is not DeepSpeedCPUAdam:
            _check_masters(filled["bf16"], adam, where)

    def ds_builder(self, *, offloaded: bool, on_cuda: bool) -> str | None:
        if offloaded:
            return "CPUAdamBuilder"
        return "FusedAdamBuilder" if on_cuda else None


def _check_masters(bf16: dict[str, Any], adam: type, where: str) -> None:
    """Refuse bf16 masters with fp32 moments, which DeepSpeed's CPU Adam alone updates."""
    if bf16.get("bf16_master_weights_and_grads") and not bf16.get("bf16_optimizer_states"):
        raise UserError(
            "deepspeed: bf16.bf16_master_weights_and_grads: without bf16_optimizer_states it needs DeepSpeed's CPU Adam, "
            f"by zero_optimization.offload_optimizer.device=cpu, and not {adam.__name__}; remove it from {where}"
        )


def _implementation(params: dict[str, Any], offloaded: bool) -> type:
    """The class that DeepSpeed takes."""
    if params.get("torch_adam"):
        return torch.optim.AdamW
    return DeepSpeedCPUAdam if offloaded else FusedAdam


def _try_torch_adam(params: dict[str, Any], where: str) -> None:
    """Refuse values that torch's optimizer refuses; on one parameter, as only it knows what goes with what."""
    try:
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"deepspeed: optimizer.params: {error} in {where}") from None
