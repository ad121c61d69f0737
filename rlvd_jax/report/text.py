"""Text and numbers as the page shows them."""

from __future__ import annotations

DASH = "–"

_CONTROLS = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}
_CONTROLS |= {c: f"⟨U+{c:04X}⟩" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS |= dict.fromkeys((*range(128, 160), *range(55296, 57344), 65534, 65535), 65533)


def visible(text: str) -> str:
    """`text` with what cannot stand in a document made visible: control characters as their pictures (␀), those that
    turn the direction of writing by their number, lone surrogates and noncharacters as U+FFFD. A carriage return
    before a line feed goes."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, its middle left out: both ends of a model's name tell it apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A fixed number of decimals with thousands separated, a true minus sign, a dash for None."""
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float | None, sign: bool = False) -> str:
    """A share in [0, 1] (or a difference of two) in percent, one decimal, without the percent sign."""
    return number(None if share is None else 100 * share, 1, sign)


def interval(estimate: dict | None, scale: float = 1, digits: int = 1, sign: bool = False) -> str:
    """`[low, high]` of an estimate, the numbers as in `number`; empty where there is none."""
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return ""
    low, high = (number(scale * estimate[k], digits, sign) for k in ("low", "high"))
    return f"[{low}, {high}]"


def value_of(estimate: dict | None) -> float | None:
    return estimate.get("value") if estimate else None
