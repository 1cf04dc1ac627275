"""What a run writes and can go on without: no number is worth a run. Rank 0 only."""

from __future__ import annotations

from collections.abc import Callable


class BestEffort:
    """Makes writes that may fail: `tell` gets a line where one begins to fail, and one where it works again."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._failing: set[str] = set()

    def attempt(self, what: str, write: Callable[[], object], *, errors: type[Exception] = OSError) -> bool:
        """Call `write`, and return whether it did its work; only `errors` are failures. `what` is what the user reads."""
        try:
            write()
        except errors as error:
            if what not in self._failing:
                self._failing.add(what)
                self._tell(
                    f"WARNING: {what} cannot be written: {reason_of(error)}; training goes on, and tries again"
                )
            return False
        if what in self._failing:
            self._failing.remove(what)
            self._tell(f"{what}: written again")
        return True


def reason_of(error: Exception) -> str:
    """Why something could not be written, in the system's words where it has some."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": '{error.filename}'" if error.filename else "")
    return str(error) or type(error).__name__
