"""What ranks tell one another through the store: a failure, and what came of rank 0's work before the others are let in.

Nothing that is read there can be trusted: whoever reaches the store may have written it. What none of our ranks writes ends
the run as a failure.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from bico_ds.common.errors import RunError, UserError
from bico_ds.common.json_files import JsonError, parse_object
from bico_ds.runtime.nodes.failed_node import is_node_name, node_name

_MOST_BYTES = 1 << 16
_MOST_CHARACTERS = 4000
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CODES = (1, 2)
FOREIGN = "the ranks' store holds what no rank has written: somebody else reaches MASTER_ADDR:MASTER_PORT"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ends the run. `stalled`: stacks are written. `code`: the process's exit code, 1 or 2.

    `is_certain`: its text is the cause; else another rank's end, which that rank could not tell, may be. `rank` None: of
    nobody who is known. `host`: the node of a rank that crashed or is gone, which may be its node's fault.
    """

    rank: int | None
    text: str
    code: int = 1
    stalled: bool = False
    is_certain: bool = True
    host: str | None = None

    @classmethod
    def of(cls, error: BaseException, rank: int, *, is_certain: bool) -> Failure:
        if isinstance(error, UserError | RunError):
            return cls(rank=rank, text=str(error), code=error.exit_code, is_certain=is_certain)
        host = node_name() if is_certain and isinstance(error, Exception) else None
        return cls(rank=rank, text=f"{type(error).__name__}: {error}", is_certain=is_certain, host=host)

    def __str__(self) -> str:
        return self.text if self.rank is None else f"rank {self.rank}: {self.text}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"text": self.text[:_MOST_CHARACTERS]})

    @classmethod
    def from_store(cls, content: bytes, *, world_size: int) -> Failure:
        """What a rank reports, without control characters; never one with exit code 0."""
        found = _object(content)
        rank, text, code = (found.get(name) for name in ("rank", "text", "code"))
        flags = found.get("stalled"), found.get("is_certain")
        is_ours = isinstance(text, str) and all(isinstance(flag, bool) for flag in flags)
        if not is_ours or not _is_whole(rank, range(world_size)) or not _is_whole(code, _CODES):
            return cls(rank=None, text=FOREIGN)
        stalled, is_certain = flags
        return cls(
            rank=rank,  # type: ignore[arg-type]
            text=_shown(text),  # type: ignore[arg-type]
            code=code,  # type: ignore[arg-type]
            stalled=stalled,  # type: ignore[arg-type]
            is_certain=is_certain,  # type: ignore[arg-type]
            host=_node(found.get("host")),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How rank 0's work ended: the name of what it raised, empty where it is done, and the text."""

    kind: str
    text: str

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"text": self.text[:_MOST_CHARACTERS]})

    @classmethod
    def from_store(cls, content: bytes) -> Verdict:
        """What rank 0 has written. Raises `RunError` for anything else."""
        found = _object(content)
        kind, text = found.get("kind"), found.get("text")
        if not isinstance(kind, str) or not isinstance(text, str):
            raise RunError(FOREIGN)
        return cls(kind=kind, text=_shown(text))


def _object(content: bytes) -> dict[str, object]:
    try:
        return (
            parse_object(content, Path("message of a rank"), strict=False)
            if len(content) <= _MOST_BYTES
            else {}
        )
    except JsonError:
        return {}


def _is_whole(value: object, allowed: range | tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in allowed


def _node(name: object) -> str | None:
    """A node's name, which the launcher's commands may be given; None for anything else."""
    return name if is_node_name(name) else None


def _shown(text: str) -> str:
    return _CONTROL.sub("", text)[:_MOST_CHARACTERS]
