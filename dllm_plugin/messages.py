"""Values as messages show them: a line at most, however large they are. Standard library only."""

import reprlib
from typing import Any

LONGEST = 200  # characters


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3


_SHORT = _Short()


def shown(value: Any) -> str:
    """The value's repr, cut so that one of a megabyte costs no more than another: it is never built as a whole."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an integer of thousands of digits has none, and a value's own code may raise anything
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
