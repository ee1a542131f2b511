"""Text from users, such as names, shown as text: no medium takes any of it for markup or commands."""

import unicodedata

IN_MATPLOTLIB = {"text.parse_math": False}
"""Settings under which matplotlib draws text as it is: dollar signs would otherwise begin a formula."""

LONGEST_LABEL = 60  # characters

_KEPT = "\n\t"
_DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}  # they reorder what stands after them


def unprintable(text: str) -> bool:
    """Whether the text holds characters that a terminal or a file would take for more than text."""
    return not text.isprintable() and any(_is_command(character) for character in text)


def escape(text: str) -> str:
    """The text with control characters written out, as in `\\x1b`; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(ascii(character)[1:-1] if _is_command(character) else character for character in text)


def on_one_line(text: str) -> str:
    """As `escape`, for the labels of pictures: line breaks and tabs are written out as well, and of what is longer than
    `LONGEST_LABEL` the middle is left out, or the picture would have no room."""
    line = "".join(ascii(character)[1:-1] if character in _KEPT else character for character in escape(text))
    half = LONGEST_LABEL // 2
    return line if len(line) <= LONGEST_LABEL else f"{line[:half]}…{line[-half:]}"


def _is_command(character: str) -> bool:
    if character in _KEPT:
        return False
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS
