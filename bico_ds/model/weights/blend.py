"""Blends of a base and what was trained from it: weights between the two (Wortsman et al., arXiv 2109.01903)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def blended(base: Tensor, trained: Tensor, share: float) -> Tensor:
    """base + share · (trained − base), in fp32; at 0 and 1 the one or the other as it is, bit for bit."""
    if share in (0.0, 1.0):  # by arithmetic -0.0 would become 0.0
        return trained if share else base
    return torch.lerp(base.float(), trained.float(), share)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What a blend is made of, as its README.md says it.

    `share`: of the trained weights, 0 to 1. `base`: where the base was read. `fingerprint`: its own, as recorded by the
    run; None where that records none.
    """

    share: float
    base: str
    fingerprint: str | None
    run: str
    step: int

    @property
    def folder(self) -> str:
        """The name of its folder among others: the share, in at least two decimals."""
        rounded = f"{self.share:.2f}"
        return f"blend-{rounded if float(rounded) == self.share else self.share}"

    def write(self, folder: Path) -> None:
        """Write README.md."""
        text = f"""# {self.run}, blended with its base

Each weight is base + {self.share} (trained − base), computed in fp32 (arXiv 2109.01903).

| | |
|---|---|
| share of the trained weights | {self.share} |
| run | {self.run} |
| step | {self.step} |
| base | {self.base} |
| fingerprint of the base | {self.fingerprint or "not recorded by the run"} |
"""
        (folder / "README.md").write_text(text, encoding="utf-8")
