"""A name for a model by a sample of its weights: found in seconds at any size, before they are loaded."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PretrainedConfig

from bico_ds.model.architecture import architecture_values
from bico_ds.model.weights.load import WeightFolder

# Elements at each end of a tensor.
_SAMPLE = 2048


def sampled_fingerprint(config: PretrainedConfig, weights: WeightFolder) -> str:
    """Return a hash of the architecture, and of name, shape, dtype and some elements at both ends of every tensor.

    Training changes every tensor nearly everywhere, so that two models of one architecture differ in it; one that was edited
    by hand in the midst of a tensor does not.
    """
    digest = hashlib.sha256(json.dumps(architecture_values(config), sort_keys=True).encode())
    for name, shape in sorted(weights.shapes.items()):
        size = shape.numel()
        for start in dict.fromkeys((0, max(0, size - _SAMPLE))):
            part = weights.read(name, shape, start, min(size, start + _SAMPLE)).contiguous()
            digest.update(f"{name} {tuple(shape)} {part.dtype} {start}\n".encode())
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
