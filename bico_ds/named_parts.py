"""Names for parts of a step, in a profile of it; while none is made they cost next to nothing. No torch here.

What is a kernel or an autograd function by itself has its own name in a profile; a named part tells what is made of torch's
operations. The names are values of `bico_ds.planner.report.step_parts.StepPart`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_NOTHING = nullcontext()
_begin: Callable[[str], AbstractContextManager[object]] | None = None


def step_part(name: str) -> AbstractContextManager[object]:
    """What runs inside is the part `name` of the step, unless another one inside of it says otherwise."""
    return _NOTHING if _begin is None else _begin(name)


def as_step_part(name: str) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorate a function that runs in a `step_part`. Not for generators: what runs between their values is not theirs."""

    def decorated(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def run(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
            if _begin is None:
                return function(*arguments, **options)
            with _begin(name):
                return function(*arguments, **options)

        return run

    return decorated


@contextmanager
def recording(begin: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, every named part on every thread also is what `begin` makes of its name."""
    global _begin
    before, _begin = _begin, begin
    try:
        yield
    finally:
        _begin = before
