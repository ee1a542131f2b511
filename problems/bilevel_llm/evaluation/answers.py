r"""The final answer of a worked solution, as GSM8K and MATH write it, and whether two of them are the same.

Looked for in this order: `#### 42` (GSM8K; what follows the first one is beyond the answer), the last `\boxed{...}` (MATH),
the last "the answer is ...", the text itself if it is nothing but a number, and else its last number.

Normalized: white space, `$`, `\left`, `\right`, degree and percent signs, `\text{...}`, `\dfrac`, a leading `x =`, and units
after a number go. Numbers are the same if their values are: 1,000 and 1000.0; \frac{1}{2}, 1/2 and 0.5; 50% and 50.

Not done by math-verify (0.9.0), although it knows that x + 1 is 1 + x: it takes the last answer where a model goes on with
another question after `####`, finds no `(B)`, "yes", `\fbox` or `####7`, does not hold 1 1/2 to be 1.5, or 18 dollars to be
\$18, holds 50% to be 0.5, and raises an error outside of the main thread, as its time limits are signals.
"""

from __future__ import annotations

import re
from fractions import Fraction

_LONGEST = 1000
"""Characters of what may be a number: Python refuses to read very long ones, which a model that repeats itself writes."""
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(r"answer\b[^\n.:=]{0,40}?(?:\bis\b|=|:)[ \t]*:?(?=[ \t]*\S)", re.IGNORECASE)
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)}}])-[ ]?)?\$?(?:{_PLAIN})(?:[ ]?/[ ]?(?:{_PLAIN}))?")
_NUMBER = re.compile(rf"-?(?:{_PLAIN})")
_RATIO = re.compile(r"(-?)(\d+)/(\d+)")
_FRACTION = re.compile(r"(-?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_MIXED = re.compile(r"^(-?\d+)\s+(\d+/\d+)(?=\s|$)")
# After a number, words are its unit, but for those that go on with the expression.
_UNIT = re.compile(
    rf"^((?:-\s?)?(?:{_PLAIN})(?:/\d+)?)(?:\s+(?!pi\b|sqrt\b|x\b|times\b|plus\b|minus\b|[+*/=^-])[A-Za-z].*"
    r"|\s*(?:cm|mm|km|kg|mph|ft|lbs?|mL|hrs?|hours?|mins?|minutes?|am|pm|AM|PM|th|st|nd|rd)\b.*)$"
)
_VARIABLE = re.compile(r"^[A-Za-z]\s*=\s*(?=\S)")
_GONE = re.compile(
    r"\\(?:left|right|bigl?|bigr?|displaystyle|limits)(?![A-Za-z])|\\[,;:! ]|\\?\$|\^\{?\\circ\}?|\\degree\b|°|\\?%|€|£|~"
)


def final_answer(text: str) -> str | None:
    """The normalized final answer; None if there is none."""
    if found := _HASHES.search(text):
        return _from_clause(found[1])
    if (boxed := _last_boxed(text)) is not None:
        return normalize(boxed)
    if leads := list(_ANSWER_IS.finditer(text)):
        return _from_clause(text[leads[-1].end() :].partition("\n")[0])
    whole = "" if _words(text) else normalize(text)
    return whole if number(whole) is not None else _last_number(text)


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two normalized answers are the same. None is not the same as anything."""
    if one is None or other is None:
        return False
    if one.casefold() == other.casefold():
        return True
    first, second = number(one), number(other)
    return first is not None and first == second


def number(answer: str) -> Fraction | None:
    r"""The value of a normalized answer that is a number, a/b, \frac{a}{b}, or a whole number and such a fraction."""
    if len(answer) > _LONGEST:
        return None
    if _NUMBER.fullmatch(answer):
        return Fraction(answer.replace(",", ""))
    if found := _RATIO.fullmatch(answer):
        sign, whole, top, bottom = found[1], "", found[2], found[3]
    elif found := _FRACTION.fullmatch(answer):
        sign, whole, top, bottom = found.groups()
    else:
        return None
    if int(bottom) == 0:
        return None
    value = Fraction(int(whole or 0)) + Fraction(int(top), int(bottom))
    return -value if sign else value


def normalize(answer: str) -> str:
    """An answer without the parts that do not change its meaning."""
    text = answer.strip().replace("\u2212", "-").replace("\u2013", "-").replace("{,}", ",")
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm|mathbf|textnormal)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\[()\[\]]", "", _GONE.sub(" ", text)).replace("**", " ").strip().rstrip(".,;:!").strip()
    text = _VARIABLE.sub("", text)
    if found := _MIXED.match(text):
        whole, part = found[1], found[2]
        text = f"{whole}\\frac{{{part.replace('/', '}{')}}}{text[found.end() :]}"
    if found := _UNIT.match(text):
        text = found[1]
    text = re.sub(r"\\(frac|sqrt)\s*(?![\s{\[A-Za-z])", r"\\\1 ", text)  # the arguments of \frac12 and \sqrt3 follow at once
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = "".join(text.split())
    text = re.sub(r"(\\frac\{-?\d+\}\{-?\d+\})[A-Za-z]+$", r"\1", text)  # its unit
    return text.replace(",", "") if _NUMBER.fullmatch(text) else text


def _from_clause(clause: str) -> str | None:
    """The answer in what follows "####" or "the answer is": the clause, or, in a sentence, its last number."""
    answer = normalize(re.split(r"[.!?]\s", clause, maxsplit=1)[0])
    if number(answer) is not None or not answer:
        return answer or None
    return (_last_number(clause) if len(_words(clause)) >= 2 else None) or answer


def _words(text: str) -> list[str]:
    """The words that are not LaTeX commands."""
    return re.findall(r"(?<![\\A-Za-z{])[A-Za-z]{2,}", text.replace("\\text", ""))


def _last_number(text: str) -> str | None:
    found = _NUMBER_IN_TEXT.findall(text)
    return normalize(found[-1].replace("- ", "-").replace(" ", "")) if found else None


def _last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, braces within it included; None if it is not closed."""
    for start in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=\S))", text))):
        if start[1] != "{":  # \boxed 42
            return re.match(r"[^\s$]+", text[start.end() :])[0]  # type: ignore[index]  # something stands there
        depth = 1
        for end in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start.end() : end]
    return None
