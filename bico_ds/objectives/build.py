"""From the recipe's `objectives` to objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from bico_ds.config.errors import UserError
from bico_ds.config.schema import BicoSpec, NtpSpec
from bico_ds.objectives.base import Objective
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.masks import MaskPolicy
from bico_ds.objectives.ntp import NextTokenPrediction


def build_objectives(
    specs: Sequence[NtpSpec | BicoSpec], *, special_ids: Iterable[int], placeholder_id: int | None
) -> list[Objective]:
    """Build the objectives, in the recipe's order, with unique names (`bico`, `bico_2`, …).

    `special_ids` (BOS, EOS, padding) are never masked. `placeholder_id` stands in where a spec names none;
    UserError where neither does.
    """
    special = tuple(sorted(set(special_ids)))
    seen: Counter[str] = Counter()
    objectives: list[Objective] = []
    for index, spec in enumerate(specs):
        seen[spec.kind] += 1
        name = spec.kind if seen[spec.kind] == 1 else f"{spec.kind}_{seen[spec.kind]}"
        if isinstance(spec, NtpSpec):
            objectives.append(NextTokenPrediction(name=name, loss_on=spec.loss_on))
            continue
        placeholder = spec.placeholder_id if spec.placeholder_id is not None else placeholder_id
        if placeholder is None:
            raise UserError(
                f"objectives[{index}].placeholder_id is not given, and the tokenizer has no unk, pad or eos "
                "token: name a token id that stands at masked positions"
            )
        policy = MaskPolicy(spec=spec.mask, special_ids=special)
        objectives.append(MaskDenoising(policy=policy, placeholder_id=placeholder, name=name))
    return objectives
