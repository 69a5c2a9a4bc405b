"""Bounds on numbers that come from other people's files."""

MAX_SIZE = 2**20  # Of anything in a network; a guard against files.
MAX_NUMBER = 1e6  # A guard against files; no honest setting is near it.


def is_number(value: object) -> bool:
    """Whether a setting is a number to calculate with: finite, and not astronomical."""
    return isinstance(value, int | float) and abs(value) < MAX_NUMBER
