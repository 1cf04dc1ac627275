"""What a stranger writes into the ranks' store never ends a run as if it were done."""

from __future__ import annotations

import contextlib
import json
import random

import pytest

from bico_ds.common.errors import RunError
from bico_ds.runtime.meeting.messages import FOREIGN, Failure, Verdict
from bico_ds.runtime.meeting.processes import ProcessIdentity
from tests.cpu_time import cpu_seconds_below

OURS = Failure(rank=1, text="no such file", code=2, stalled=False, is_certain=True)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    10**39,
    10**4000,
    1.5,
    "",
    "1",
    "rank",
    "\x1b[2J",
    "\ud83d",
    [],
    {},
    [[]],
)


def mutated(draw: random.Random, content: dict[str, object]) -> bytes:
    """A message in which one thing is not as a rank would write it."""
    changed = dict(content)
    for _ in range(draw.randint(1, 2)):
        changed[draw.choice([*content, "other"])] = draw.choice(VALUES)
    if draw.random() < 0.2:
        changed.pop(draw.choice([*content]), None)
    text = bytearray(json.dumps(changed) if draw.random() < 0.9 else f"{content}", encoding="ascii")
    kind = draw.randrange(6)
    if kind == 0:
        text = text[: draw.randrange(len(text))]
    elif kind == 1:
        text[draw.randrange(len(text))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        text = bytearray(b"[" * 5000) + text
    return bytes(text)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"0", b'"x"', b"NaN", b"\xff\xfe", b"[" * 60000, b"1" * 100_000]
)
def test_what_is_no_message_ends_the_run_as_a_failure(raw):
    failure = Failure.from_store(raw, world_size=2)
    assert (failure.code, failure.rank, str(failure)) == (1, None, FOREIGN)
    with pytest.raises(RunError, match="somebody else reaches MASTER_ADDR:MASTER_PORT"):
        Verdict.from_store(raw)
    assert ProcessIdentity.from_store(raw) is None


def test_no_message_has_exit_code_0_a_rank_that_is_none_or_control_characters():
    draw, verdict = random.Random(random.getrandbits(64)), {"kind": "UserError", "text": "no such file"}
    identity = {"space": "here", "pid": 7, "began": 1.5, "node": "n1"}
    with cpu_seconds_below(3):
        for _ in range(300):
            failure = Failure.from_store(mutated(draw, json.loads(OURS.to_json())), world_size=2)
            assert failure.code in (1, 2) and failure.rank in (None, 0, 1)
            assert all(character == "\n" or character >= " " for character in failure.text)
            ProcessIdentity.from_store(mutated(draw, identity))
            with contextlib.suppress(RunError):
                Verdict.from_store(mutated(draw, verdict))


def test_what_a_rank_reports_arrives_as_it_was_written():
    assert Failure.from_store(OURS.to_json().encode(), world_size=2) == OURS
    text = "x" * 10**6
    assert Failure.from_store(Failure(rank=0, text=text).to_json().encode(), world_size=1).text in text
    with pytest.raises(RunError, match="cannot"):
        raise RunError(Verdict.from_store(Verdict(kind="RunError", text="cannot").to_json().encode()).text)
