"""What of this machine each of the runs has that train side by side: GPUs, or cores. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bico_ds.common.errors import UserError

_GPUS, _THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of one place: `gpus` by their numbers, none where it trains on CPUs, and `threads` of each of its `ranks`."""

    ranks: int
    gpus: tuple[str, ...]
    threads: int

    def launcher_words(self, launcher: str, port: int) -> list[str]:
        """DeepSpeed's launcher on these GPUs, or with so many ranks on CPUs, with a port of its own.

        Told a number it takes the first GPUs of the machine, whichever are visible: with GPUs it is told none.
        """
        count = [] if self.gpus else ["--num_accelerators", str(self.ranks)]
        return [launcher, *count, "--master_port", str(port)]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """That of the launcher; the number of threads that a user has set stays."""
        own = {_GPUS: ",".join(self.gpus)} if self.gpus else {}
        return {_THREADS: str(self.threads), **inherited, **own}

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        if self.gpus:
            return f"{ranks} on GPU{'s' * (len(self.gpus) > 1)} {', '.join(self.gpus)}"
        return f"{ranks} of {self.threads} thread{'s' * (self.threads > 1)}"


def divide(places: int, *, ranks: int | None, gpus: Sequence[str], cores: int) -> list[Share]:
    """A share for each place; without `ranks` all GPUs are divided, and on CPUs each place has one rank.

    Raises `UserError` where there are too few GPUs.
    """
    if gpus and ranks is None and places > len(gpus):
        raise UserError(f"--jobs {places}: more than the {len(gpus)} visible GPU(s); give a smaller number")
    ranks = ranks or len(gpus) // places or 1
    if gpus and places * ranks > len(gpus):
        raise UserError(
            f"--jobs {places} x --ranks {ranks}: each rank needs a GPU of its own, and {len(gpus)} are visible; give "
            "smaller numbers, or set DS_ACCELERATOR=cpu to train on CPUs"
        )
    threads = max(cores // (places * ranks), 1)
    firsts = range(0, places * ranks, ranks)
    return [Share(ranks=ranks, gpus=tuple(gpus[first : first + ranks]), threads=threads) for first in firsts]


def visible_gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """The numbers of the GPUs that are to be used, of `count` that torch sees.

    Raises `UserError` where CUDA_VISIBLE_DEVICES names them in another way.
    """
    if environment.get("DS_ACCELERATOR") == "cpu":
        return []
    named = environment.get(_GPUS)
    gpus = [str(number) for number in range(count)] if named is None else named.split(",")[:count]
    if wrong := next((gpu for gpu in gpus if not gpu.strip().isdecimal()), None):
        raise UserError(
            f"{_GPUS}: DeepSpeed's launcher knows GPUs by their numbers alone, not as '{wrong[:40]}'; give numbers"
        )
    return [gpu.strip() for gpu in gpus]
