"""The paper's own numbers, to print beside a run's (Tables 1, 3 and 4; sections 4.2, 6.1, 6.2; A.7, A.10.4).

Shares are fractions of 1. Problems go by the names of the known sets: math-train, math-500, aime25.
"""

from __future__ import annotations

from rlvd_jax.errors import UserError, nearest


def _table3(train, test) -> dict:
    return {
        split: dict(zip(("accuracy", "maj", "pass"), (round(x / 100, 3) for x in row), strict=True))
        for split, row in (("math-train", train), ("math-500", test))
    }


def _table4(train, test) -> dict:
    return {"math-train": {"accuracy": round(train / 100, 3)}, "math-500": {"accuracy": round(test / 100, 3)}}


ROWS = {
    "Qwen2.5-Math-1.5B/base": _table3((64.0, 76.8, 97.2), (60.6, 72.0, 97.2)) | {"aime25": {"pass": 0.567}},
    "Qwen2.5-Math-1.5B/rl": _table3((80.9, 82.1, 97.1), (74.2, 80.8, 97.0)),
    "Qwen2.5-Math-1.5B/base-from-base": _table4(74.7, 63.4),
    "Qwen2.5-Math-1.5B/rl-from-rl": _table4(84.4, 74.4),
    "Qwen2.5-Math-1.5B/base-from-rl": _table4(80.5, 74.2),
    "Qwen2.5-Math-1.5B/new-knowledge": {"aime25": {"pass": 0.70}},
    "Qwen2.5-Math-1.5B/reasoning-only": {"math-500": {"accuracy": 0.68}},
    "Qwen2.5-3B/base": _table3((59.3, 80.9, 92.7), (54.9, 76.5, 95.8)) | {"aime25": {"pass": 0.433}},
    "Qwen2.5-3B/rl": _table3((67.9, 82.2, 92.1), (63.6, 79.5, 95.8)),
    "Qwen2.5-3B/base-from-base": _table4(73.6, 58.7),
    "Qwen2.5-3B/rl-from-rl": _table4(72.1, 64.4),
    "Qwen2.5-3B/base-from-rl": _table4(73.6, 64.5),
    "QwQ-32B/teacher": {"aime25": {"pass": 0.767}},
}
"""By a model's `paper` setting and problems: accuracy, maj@256 and pass@256 (QwQ-32B: pass@64).

Tables 1 and 4 give another test accuracy than Table 3 for two rows; `NOTES` says so.
"""

NOTES = {
    "Qwen2.5-Math-1.5B/base": "Tables 1 and 4 give 62.6% for the test accuracy; pass@512 on AIME25 is 56.7% too.",
    "Qwen2.5-Math-1.5B/rl": "Tables 1 and 4 give 74.8% for the test accuracy.",
    "Qwen2.5-3B/rl": "Best checkpoint at step 150 of 225; response length stable over training.",
    "QwQ-32B/teacher": "pass@64, from 64 samples.",
}

COMPARISONS = {
    ("Qwen2.5-Math-1.5B/base", "Qwen2.5-Math-1.5B/rl"): {
        "math-train": {"gain": {"[0]": 0.005, "[1–4]": 0.006, "[17–64]": 0.247, "[65–128]": 0.366}},
        "math-500": {
            "moves": {
                "[1–4]": {"questions": 18, "fall": 0.167, "stay": 0.611},
                "[5–16]": {"questions": 34, "fall or stay": 0.674},
                "[65–128]": {"questions": 78, "fall": 0.013, "stay": 0.154, "rise": 0.833},
            }
        },
    },
    ("Qwen2.5-Math-1.5B/base", "Qwen2.5-Math-1.5B/new-knowledge"): {
        "math-500": {
            "moves": {"[1–4]": {"questions": 18, "fall": 0.111}, "[5–16]": {"questions": 34, "fall": 0.0}},
        }
    },
    ("Qwen2.5-Math-1.5B/base", "Qwen2.5-Math-1.5B/reasoning-only"): {
        "math-500": {
            "moves": {"[1–4]": {"questions": 18, "fall": 0.389}, "[5–16]": {"questions": 34, "fall": 0.294}},
        }
    },
}
"""By base and other model's `paper` setting and problems: gain in success rate, and shares of questions that change
bin, by the base model's bin."""


def row(paper: str) -> dict:
    """A model's published figures: {problems: {"accuracy", "maj", "pass"}}. Raises UserError for an unknown one."""
    if paper not in ROWS:
        raise UserError(f"paper: '{paper}' is not a row of the paper's tables{nearest(paper, ROWS)}")
    return ROWS[paper]


def beside(models: dict[str, dict], comparisons: list[dict]) -> dict:
    """What the paper published for a study's models (those with a `paper` entry) and its comparisons:
    {"models": {name: {"paper", "problems", "note"}}, "comparisons": {"base→other": {problems: …}}}."""
    paper = {name: model["paper"] for name, model in models.items() if model.get("paper")}
    pairs = {(c["base"], c["other"]): (paper.get(c["base"]), paper.get(c["other"])) for c in comparisons}
    return {
        "models": {name: {"paper": key, "problems": row(key), "note": NOTES.get(key)} for name, key in paper.items()},
        "comparisons": {
            f"{base}→{other}": COMPARISONS[key] for (base, other), key in pairs.items() if key in COMPARISONS
        },
    }
