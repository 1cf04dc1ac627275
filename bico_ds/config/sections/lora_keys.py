"""Keys of peft's LoraConfig that `model.lora` has not: what to write in their place, or why they are refused."""

from __future__ import annotations

from typing import Any

from bico_ds.config.section import mistake_at

_OUR_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
}
_DORA = (
    "DoRA is not supported: it divides by the norm of each row of base and adapters together, for which every forward pass "
    "needs the whole changed weight; attention, memory plan, merge and the step that switches adapters off know none. "
    "Remove the key: rslora is supported, and so is a higher rank"
)
_WHOLE_MODULES = (
    "the checkpoints, the memory plan and the base's fingerprint of a LoRA run are made for adapters beside a base that is "
    "frozen as a whole; no module is trained whole. Remove the key, or train all weights (model.lora: null)"
)
_REFUSED = {
    "dora": _DORA,
    "use_dora": _DORA,
    "modules_to_save": _WHOLE_MODULES,
    "trainable_token_indices": _WHOLE_MODULES,
    "bias": f"biases belong to the base: {_WHOLE_MODULES}",
}


def refuse_keys_of_peft(values: Any) -> None:
    """Raise pydantic's `ValidationError`, at the key, for a section that is written as for peft."""
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if (ours := _OUR_NAMES.get(key)) is not None:
            raise mistake_at((key,), f"this is peft's name, the key is '{ours}' here: rename it", value)
        if (reason := _REFUSED.get(key)) is not None:
            raise mistake_at((key,), reason, value)
