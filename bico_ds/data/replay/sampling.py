"""Texts sampled from a model itself, at temperature 1: what it knows, in its own words.

Next-token prediction on such texts is, in expectation, the gradient of KL(base ‖ model), without a second model in memory
(2403.01244; 2605.26097).

Shape legend: B texts in a batch, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bico_ds.common.random_numbers import hash_words, uniform

Model = Callable[..., Any]


@torch.no_grad()
def sample_texts(
    model: Model,
    numbers: NDArray[np.int64],
    *,
    seed: int,
    start: int,
    stops: Sequence[int],
    most_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Return the texts of these numbers: `start`, then sampled tokens up to the first of `stops`, which ends the text.

    `model`: a Hugging Face causal LM on `device`, in evaluation mode. A text has at most `most_tokens` tokens, the first one
    included; one that is cut there has no stop token. Text n is drawn by a hash of (seed, n, position), so it does not
    depend on the other texts of its batch, but for what rounding in a larger product does to the logits.
    """
    stop_ids = torch.tensor(list(stops), dtype=torch.long, device=device)
    texts = [[start] for _ in numbers]
    rows = np.arange(len(numbers))  # the texts that are in the batch
    tokens = torch.full((len(rows), 1), start, dtype=torch.long, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    cache = None
    for position in range(1, most_tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        draws = uniform(hash_words("sample", seed, numbers[rows], position))
        chosen = _choose(output.logits[:, -1], torch.from_numpy(draws).to(device))
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            texts[row].append(token)
        finished |= torch.isin(chosen, stop_ids)
        if (ended := int(finished.sum())) == len(rows):
            break
        if 2 * ended > len(rows):  # not at each end: the whole cache is copied
            going = torch.nonzero(~finished)[:, 0]
            cache.batch_select_indices(going)
            rows, chosen, finished = rows[going.cpu().numpy()], chosen[going], finished[going]
        tokens = chosen[:, None]
    ends = set(stops)
    return [_until_stop(text, ends) for text in texts]


def _choose(logits_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes the draw, int64 [B]; the softmax is summed in fp64."""
    total_BV = logits_BV.float().softmax(-1).double().cumsum(-1)
    # Scaled by the sum: rounding must not leave a draw above it.
    wanted_B1 = (draws_B * total_BV[:, -1])[:, None]
    return torch.searchsorted(total_BV, wanted_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


def _until_stop(text: list[int], ends: set[int]) -> list[int]:
    """The text up to its first stop token after the start, which may be one itself."""
    stop = next((place for place, token in enumerate(text) if place and token in ends), None)
    return text if stop is None else text[: stop + 1]
