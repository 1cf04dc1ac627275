"""Nodes without a network: what has a name on the hub must be in its cache already. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.paths import HubName

_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its variables
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_offline() -> bool:
    """Whether Hugging Face's libraries read their cache alone in this process."""
    return any(
        os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def caches() -> dict[str, Path]:
    """The variables that name this process's cache of the hub, by which a job finds the same one."""
    from huggingface_hub import constants

    home, hub = Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE)
    return {"HF_HOME": home} | ({"HF_HUB_CACHE": hub} if hub != home / "hub" else {})


def cached_model(name: HubName) -> list[Path]:
    """The files of a hub's model in this machine's cache: config and weights. Raises `UserError` where some are missing."""
    folder = _snapshot(name)
    wanted = ["config.json"]
    if (folder / _INDEX).is_file():
        try:
            wanted += sorted(set(read_object(folder / _INDEX)["weight_map"].values()))
        except (JsonError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"its {_INDEX} in the cache is broken ({error}); {_fetch(name)}") from None
    else:
        wanted.append("model.safetensors")
    return _all_of(folder, wanted, name)


def cached_tokenizer(name: HubName) -> list[Path]:
    """The tokenizer of a hub name in this machine's cache. Raises `UserError` where it is missing."""
    folder = _snapshot(name)
    found = [folder / file for file in _TOKENIZERS if (folder / file).exists()]
    if not found:
        raise UserError(f"its tokenizer is not in the cache ('{folder}'); {_fetch(name)}")
    return found


def _snapshot(name: HubName) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        raise UserError(f"the nodes are offline, and it is not in the hub's cache; {_fetch(name)}") from None


def _all_of(folder: Path, names: list[str], name: HubName) -> list[Path]:
    missing = [file for file in names if not (folder / file).exists()]
    if missing:
        raise UserError(
            f"the nodes are offline, and {len(missing)} of {len(names)} files are not in the cache '{folder}', first "
            f"'{missing[0]}'; {_fetch(name)}"
        )
    return [folder / file for file in names]


def _fetch(name: HubName) -> str:
    return f"where there is a network, fetch it: hf download {name} (HF_HOME is the cache, which the nodes must share)"
