"""The one exception type that means: the input is wrong, and here is what to do about it."""


class InputError(ValueError):
    """Raised for input this library cannot use; the message says what was wrong, expected, and what to do."""
