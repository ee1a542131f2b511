"""Docstrings as Markdown, for the API reference.

The docstrings are written to be read as text: `name: meaning` at the beginning of a line describes a field or an argument,
and a star is a star.
"""

import re
from typing import Any

import griffe

FIELD = re.compile(r"((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): (?=\S)(.*)")


def as_markdown(text: str) -> str:
    """Fields become a list, and no star outside of code is emphasis."""
    lines: list[str] = []
    in_field = False
    for line in text.splitlines():
        field = FIELD.fullmatch(line)
        indented = line.startswith("    ")
        if field:
            if lines and lines[-1] and not in_field:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in field[1].split(", "))
            lines.append(f"- {names}: {escape(field[2])}")
        elif indented and not in_field:
            lines.append(line)  # a formula or a listing
        else:
            if in_field and line and not indented:
                lines.append("")
            lines.append(escape(line))
        in_field = bool(field) or (in_field and indented)
    return "\n".join(lines)


def escape(line: str) -> str:
    """Stars outside of backticks, escaped."""
    return "".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(re.split(r"(`[^`]*`)", line)))


class Docstrings(griffe.Extension):  # type: ignore[misc]  # not installed where types are checked
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
