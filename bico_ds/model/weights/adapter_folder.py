"""An adapter folder as peft has it: adapter_config.json beside adapter_model.safetensors, without the base's weights.

`AdapterFolder` is what one says of itself, be it ours or a stranger's. Ours have a `base.json` beside them, of which peft
knows nothing: it names the base's weights by their fingerprint, and the dtype in which they were trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.paths import FolderOrHub, FolderOrHubName
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.lora import is_adapter, merge_adapters, peft_config
from bico_ds.model.weights.checkpoint_weights import PREFIX
from bico_ds.model.weights.checksums import fingerprint_of, slice_checksum
from bico_ds.model.weights.safetensors_header import read_header
from bico_ds.model.weights.shards import DTYPES

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_BASE = "base.json"
_PICKLED = "adapter_model.bin"
# What peft puts before a parameter's name in the model that it wraps.
_WRAPPED = "base_model.model."
# Keys of a peft config that change nothing in base + scaling · B A, or whose values are read here. Any other key that is set
# asks for more: DoRA, modules beside the adapters, ranks by pattern, and what later versions of peft will have.
_PLAIN_KEYS = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", "r",
        "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "bias", "init_lora_weights", "eva_config", "megatron_config", "megatron_core", "loftq_config",
        "qalora_group_size", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
# Those of them that take some values only. Other ways to begin (pissa, loftq) change the base.
_PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class AdapterFolder:
    """Adapters of a causal LM in a folder. Nothing of it is more than looked at until `merge_into`."""

    folder: Path

    @classmethod
    def at(cls, path: FolderOrHub) -> AdapterFolder | None:
        """The adapters at `path`; None for a hub name, and for a folder with none or with a whole model beside them."""
        if (
            not isinstance(path, Path)
            or (path / "config.json").exists()
            or not (path / ADAPTER_CONFIG).is_file()
        ):
            return None
        return cls(path)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return _object(self.folder / ADAPTER_CONFIG)

    @cached_property
    def _trained_on(self) -> dict[str, Any]:
        file = self.folder / _BASE
        return _object(file) if file.exists() else {}

    @property
    def base(self) -> FolderOrHub:
        """The folder or hub name of the base. Raises `UserError` where the config names none."""
        name = self._config.get("base_model_name_or_path")
        where = f"{self.folder / ADAPTER_CONFIG}: base_model_name_or_path"
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{where}: must name the folder of the base, or its name on the hub, found {name!r:.60}"
            )
        return FolderOrHubName(name, where=where).here()

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the base's weights; None where another program wrote the folder."""
        return self._trained_on.get("fingerprint")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which base and adapters were trained; None where another program wrote the folder."""
        return DTYPES.get(str(self._trained_on.get("dtype")))

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        rank, alpha = self._config["r"], self._config["lora_alpha"]
        return float(alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)

    def describe(self) -> str:
        """In a few words, for whoever evaluates it."""
        scaled = "alpha / sqrt(rank)" if self._config.get("use_rslora") else "alpha / rank"
        known = self.fingerprint
        checked = (
            "its fingerprint is checked" if known else "no fingerprint says whether they are the trained ones"
        )
        return (
            f"adapters of rank {self._config['r']}, scaled by {scaled} = {self.scaling:g}, merged in memory into the "
            f"weights of '{self.base}': {checked}"
        )

    def check(self) -> None:
        """Raise `UserError` for what is no plain LoRA in safetensors, and where the base is not on this machine.

        Of the weights the header is read.
        """
        self._check_config()
        weights = self.folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            pickled = (
                f": only pickled ones ({_PICKLED}), which can run code" * (self.folder / _PICKLED).exists()
            )
            raise UserError(f"no {ADAPTER_WEIGHTS} in it{pickled}; give a folder with safetensors")
        _pairs(tensor.name for tensor in read_header(weights))
        base = self.base
        if isinstance(base, Path) and not base.is_dir():
            raise UserError(
                f"the base of these adapters, '{base}', is not here; correct base_model_name_or_path in {ADAPTER_CONFIG}, "
                "or write them again: bico-ds export RUN FOLDER --adapter --base MODEL"
            )

    def _check_config(self) -> None:
        for key, value in {"peft_type": None, **self._config}.items():
            if value not in _PLAIN_VALUES[key] if key in _PLAIN_VALUES else value and key not in _PLAIN_KEYS:
                raise UserError(
                    f"{ADAPTER_CONFIG}: {key}: {value!r:.60} asks for more than plain LoRA, which alone is merged here: "
                    "merge it with peft (merge_and_unload), and give the folder of the merged model"
                )
        for key in ("r", "lora_alpha"):
            value = self._config.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise UserError(f"{ADAPTER_CONFIG}: {key}: must be a number above 0, found {value!r:.60}")

    @torch.no_grad()
    def merge_into(self, causal_lm: nn.Module) -> None:
        """Add the adapters to a base model's weights, in place, as an export merges them: in fp32, rounded once.

        Raises `UserError` where the base is not the one that they were trained on, by its fingerprint, and where they do not
        fit it.
        """
        weights = dict(causal_lm.named_parameters())
        for weight in weights.values() if self.dtype is not None else ():
            weight.copy_(weight.to(self.dtype))  # as the run loaded them
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            pairs = _pairs(file.keys())
            for name, stored in pairs.items():
                if name not in weights:
                    raise UserError(f"{ADAPTER_WEIGHTS}: '{stored[0]}' is of no weight of the base")
            self._check_base(weights, pairs.keys())
            for name, (a_name, b_name) in pairs.items():
                weight = weights[name]
                a, b = (file.get_tensor(part).to(weight.device) for part in (a_name, b_name))
                if (
                    (a.dim(), b.dim()) != (2, 2)
                    or (b.shape[0], a.shape[1]) != weight.shape
                    or a.shape[0] != b.shape[1]
                ):
                    raise UserError(
                        f"{ADAPTER_WEIGHTS}: {tuple(b.shape)} times {tuple(a.shape)} does not fit {name}, which is "
                        f"{tuple(weight.shape)}"
                    )
                weight.copy_(merge_adapters(weight, a, b, self.scaling))

    def _check_base(self, weights: Mapping[str, Tensor], adapted: Iterable[str]) -> None:
        if self.fingerprint is None or self.dtype is None:
            return
        layers = {name.rpartition(".")[0] for name in adapted}
        found = fingerprint_of(
            {
                _live_name(name, layers): slice_checksum(weight.to(self.dtype).reshape(-1), 0)
                for name, weight in weights.items()
            }
        )
        if found != self.fingerprint:
            raise UserError(
                f"the base in '{self.base}' is not the one that these adapters were trained on: its fingerprint is "
                f"{found[:12]}, {_BASE} records {self.fingerprint[:12]}"
            )


def write_adapters(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    fingerprint: str | None,
) -> None:
    """Write adapters, by their names in the run's causal LM, as peft's `save_pretrained` does.

    `spec`: the run's model section. `fingerprint`: of the base. Raises `UserError` where the base is in no file.
    """
    assert spec.lora is not None, "asked for with adapters alone"
    config = peft_config(spec.lora)
    config.base_model_name_or_path = base_location(spec)
    config.inference_mode = True
    config.target_modules = list(spec.lora.targets)  # a set, whose order changes from process to process
    config.save_pretrained(folder)
    known = {"base": config.base_model_name_or_path, "fingerprint": fingerprint, "dtype": spec.dtype}
    (folder / _BASE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    stored = {
        stored_name(name): tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors makes it private


def base_location(spec: ModelSpec) -> str:
    """The base as any program finds it: a hub name as it is written, a folder by its absolute path."""
    if spec.path is None:
        raise UserError("the adapters of a random base cannot be exported without it: the base is in no file")
    place = spec.path.here()
    return str(place.absolute()) if isinstance(place, Path) else place


def stored_name(name: str) -> str:
    """A parameter `….lora_A.default.weight` of the run's causal LM by its name in peft's files."""
    return _WRAPPED + name.replace(".default.", ".")


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except JsonError as error:
        raise UserError(f"'{file}' cannot be read: {error.reason}; copy it again") from None


def _pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(A's name, B's name) in the file, by the name of the base's weight. Raises `UserError` for anything else in it."""
    known = set(names)
    pairs = {}
    for name in sorted(known):
        a_name, b_name = name.replace(".lora_B.", ".lora_A."), name.replace(".lora_A.", ".lora_B.")
        if (
            not (name.startswith(_WRAPPED) and name.endswith(".weight") and is_adapter(name))
            or not {a_name, b_name} <= known
        ):
            raise UserError(
                f"{ADAPTER_WEIGHTS}: '{name:.200}' is not one of a pair of matrices lora_A, lora_B"
            )
        pairs[a_name.removeprefix(_WRAPPED).replace(".lora_A.", ".")] = (a_name, b_name)
    if not pairs:
        raise UserError(f"{ADAPTER_WEIGHTS}: no adapters are in it")
    return pairs


def _live_name(name: str, adapted_layers: set[str]) -> str:
    """A base parameter's name in the run's model, where fingerprints are made of names."""
    layer, _, kind = name.rpartition(".")
    return f"{PREFIX}{layer}.base_layer.{kind}" if layer in adapted_layers else PREFIX + name
