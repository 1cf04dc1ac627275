from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from bico_ds.evaluation.replica import full_replica


class WrittenMemory(TorchDispatchMode):
    """Elements of the largest tensor that exists in each dtype, meta tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.largest[out.dtype] = max(self.largest.get(out.dtype, 0), out.numel())
        return out


def test_a_bf16_replica_never_takes_the_memory_of_an_fp32_one(tiny_llama):
    model = copy.deepcopy(tiny_llama).bfloat16()
    with WrittenMemory() as memory:
        replica = full_replica(model, device="cpu")
    assert memory.largest[torch.bfloat16] == max(p.numel() for p in model.parameters())
    assert memory.largest.get(torch.float32, 0) <= model.config.head_dim, "frequencies of the positions only"
    assert replica.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["plain", "tied", "lora", "bf16"])
def test_a_replica_has_the_same_weights_and_shares_none(tiny_llama, kind):
    model = copy.deepcopy(tiny_llama)
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model = type(model)(model.config).eval()
    if kind == "lora":
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    if kind == "bf16":
        model = model.bfloat16()
    replica = full_replica(model, device="cpu")
    ids = torch.arange(3, 13)[None]
    expected = model(ids).logits
    rounding = 1e-4 if kind == "lora" else 0.0  # adapters are merged
    torch.testing.assert_close(replica(ids).logits, expected, rtol=rounding, atol=rounding)
    assert replica.num_parameters() == tiny_llama.num_parameters() - (kind == "tied") * 43 * 32
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(replica(ids).logits, expected, rtol=rounding, atol=rounding)
