"""The one exception type that means: the input is wrong, and here is what to do about it; and text safe to show."""

import reprlib


class InputError(ValueError):
    """Raised for input this library cannot use; the message says what was wrong, expected, and what to do."""


def printable(text: object, keep: str = "") -> str:
    """Text that a terminal shows and does not obey: control characters, and bytes that are not UTF-8, as escapes.

    Args:
        text: such as the name of a file.
        keep: control characters that stay.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text)
    )


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


def shown(value: object) -> str:
    """A value as a message shows it: long ones shortened."""
    return _short.repr(value)
