r"""Where a response says what its answer is: the last `\boxed{...}`."""

import re
from fractions import Fraction
from functools import lru_cache

# A box and its brace, a box without one, any other brace.
_TOKEN = re.compile(r"(\\(?:boxed|fbox)\s*\{)|(\\(?:boxed|fbox)[ \t]+(?!\\[)\]]|[}$\s]|$))|([{}])")
_FIRST = re.compile(r"\\(?:boxed|fbox)")
_BARE_END = re.compile(r"[$\n]|\\[)\]]|\Z")
_RATIONAL = re.compile(r"(-?)(?:([0-9]{1,30})|\\[dt]?frac\{(-?[0-9]{1,30})\}\{([0-9]{1,30})\})")


def last_box(text: str) -> str | None:
    r"""The inside of the last complete `\boxed{...}`, `\fbox{...}` or `\boxed x` in `text`; None without one.

    It is returned as it stands. Of nested boxes the innermost counts, as in the paper's code and in math-verify; braces
    are counted without regard to backslashes, as there. What `\boxed x` boxes ends with the formula or the line, less a
    full stop. Unlike the paper's code, the last box counts of whatever kind it is, and one cut off before its brace
    closes doesn't hide those before it. Takes time linear in the length of `text`, whatever it holds.
    """
    last = text.rfind(r"\boxed{")
    if last >= 0 and text.find(r"\fbox", last) < 0 and text.find(r"\boxed", last + 1) < 0:  # nearly always
        end = text.find("}", last)
        if end >= 0 and text.find("{", last + 7, end) < 0:
            return text[last + 7 : end]
    first = _FIRST.search(text)
    if first is None:
        return None
    opened = []  # of each brace still open: (start of its box, start of the content), or None for no box's brace
    start, content, end = -1, 0, 0
    for token in _TOKEN.finditer(text, first.start()):
        kind = token.lastindex
        if kind == 1:
            opened.append((token.start(), token.end()))
        elif kind == 2:
            start, content, end = token.start(), token.end(), None
        elif token[0] == "{":
            opened.append(None)
        elif opened:
            box = opened.pop()
            if box and box[0] > start:
                (start, content), end = box, token.start()
    if start < 0:
        return None
    if end is None:
        return text[content : _BARE_END.search(text, content).start()].rstrip().removesuffix(".")
    return text[content:end]


def extract(text: str) -> str | None:
    r"""The answer that `text` gives in its last `\boxed{...}` (see `last_box`), spaces trimmed; None without a box."""
    inside = last_box(text)
    return None if inside is None else inside.strip()


def rational(answer: str) -> int | Fraction | None:
    r"""The value of an answer like `-12` or `\frac{3}{4}`, None for any other.

    math-verify reads just this value in such an answer in a box, and compares two of them by value.
    """
    return _rational(answer) if len(answer) <= 80 else None


@lru_cache(1 << 16)
def _rational(answer: str) -> int | Fraction | None:
    match = _RATIONAL.fullmatch(answer)
    if match is None or (match[4] and not int(match[4])):
        return None
    value = int(match[2]) if match[2] else Fraction(int(match[3]), int(match[4]))
    return -value if match[1] else value
