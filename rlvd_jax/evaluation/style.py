"""Reflection phrases in responses (Table 5, Figures 3 and 12).

The paper doesn't say how it counts. Whole words is our reading ("ok" is not in "look", "wait" not in "waiting");
plain substrings are counted beside them. Both ignore case and take straight and curly apostrophes for the same.
"""

from __future__ import annotations

import numpy as np

REFLECTION_PHRASES = (
    "actually",
    "aha",
    "alternatively",
    "another approach",
    "checking our work",
    "correction:",
    "different method",
    "double-check",
    "hmm",
    "however",
    "I made a mistake",
    "I need to reconsider",
    "I realize",
    "let me recalculate",
    "let me think",
    "let's check",
    "let's reconsider",
    "looking back",
    "make sure",
    "ok",
    "on second thought",
    "retracing",
    "to be sure",
    "to confirm",
    "verify",
    "wait",
    "we could also",
)
_PHRASES = tuple((p.lower(), p[-1].isalpha()) for p in REFLECTION_PHRASES)
_APOSTROPHES = str.maketrans("‘’ʼ＇", "''''")


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def count_keywords(texts) -> tuple[np.ndarray, np.ndarray]:
    """Reflection phrases in each text, as whole words and as plain substrings: two int32 arrays [N].

    Each phrase is counted on its own, so two that overlap both count. A search for each phrase is about twice as fast
    as one compiled pattern of all 27 (20 µs for a response of 900 characters), and finds both counts at once.
    """
    words, substrings = [], []
    for text in texts:
        text = text.lower()
        if not text.isascii():
            text = text.translate(_APOSTROPHES)
        whole = plain = 0
        for phrase, ends_in_letter in _PHRASES:
            start = text.find(phrase)
            while start >= 0:
                end = start + len(phrase)
                plain += 1
                inside = start and _in_word(text[start - 1])
                whole += not (inside or (ends_in_letter and end < len(text) and _in_word(text[end])))
                start = text.find(phrase, end)
        words.append(whole)
        substrings.append(plain)
    return np.array(words, np.int32), np.array(substrings, np.int32)
