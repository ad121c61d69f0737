"""Figures, tables, one HTML page and every number of a study, from the results of `rlvd_jax.evaluation`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlvd_jax.errors import UserError
from rlvd_jax.evaluation.analysis import plain
from rlvd_jax.report import page, text
from rlvd_jax.report.figures import counts, fewer, pass_estimate, shared_ks, spell

__all__ = ["summary_table", "write"]


def write(results: dict, directory: str | Path, samples: Mapping[str, Sequence[dict]] | None = None) -> Path:
    """Write a report into `directory` and return the path of its page.

    `index.html` is self-contained and opens from disk; `figures/` holds every figure as PNG and PDF; `results.json` is
    `results` as strict JSON. Each file is written whole or not at all, the page last; figures of an earlier
    report that this one does not have are removed.

    results: what `rlvd_jax.evaluation.analyse` returns, with study, created (ISO time), settings and versions where
    there are such. samples: for each model the responses to show, dicts with problem, gold, text, correct (bool or
    None), answer, tokens, stop ("end" or "length") and bin (a label, or None).
    Raises UserError where the directory cannot be written.
    """
    directory = Path(directory)
    results = plain(results)
    html, drawn = page.render(results, samples or {})
    files = {f"figures/{d.name}.{ending}": content for d in drawn for ending, content in d.files.items()}
    # Lone surrogates become question marks: JSON would carry them, but many readers stop at one.
    files["results.json"] = json.dumps(results, ensure_ascii=False, indent=1).encode(errors="replace")
    files["index.html"] = html.encode()
    try:
        (directory / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(directory / name, content)
        for old in (directory / "figures").iterdir():
            if old.suffix in (".png", ".pdf") and f"figures/{old.name}" not in files:
                old.unlink()
    except OSError as error:
        raise UserError(f"{directory}: the report cannot be written: {error.strerror or error}") from None
    return directory / "index.html"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def summary_table(results: dict) -> str:
    """Models × accuracy, maj@n and pass@n in percent with their intervals, for every set of problems, as plain text of
    at most 120 columns. Where models have different numbers of responses, with pass@k at the largest k that all have
    and at the largest of any, and each model's n."""
    lines = []
    for name, problems in results["problems"].items():
        models = problems["models"]
        if not models:
            continue
        n, _ = counts(models.values())
        ks, mixed = shared_ks(models.values()), bool(fewer(models))
        heads = ["accuracy", f"maj@{n}", *(f"pass@{k:,}" for k in ks)]
        widths = [6, 26, *[22] * (len(heads) - 1)] if mixed else [24] * len(heads)
        width = min(max(map(len, models)), 116 - sum(widths))
        rows = [["", *["n"] * mixed, *(f"{head} {'':<15}" for head in heads)]]
        for model, r in models.items():
            estimates = (r["accuracy"], r["maj"], *(pass_estimate(r, k) for k in ks))
            rows.append([text.shorten(model, width), *[spell(r)] * mixed, *map(_cell, estimates)])
        what = "% [95% interval]" + "; n: responses to each question" * mixed
        lines += ["", f"{name}: {problems['questions']:,} questions, {what}"]
        for row in rows:
            cells = (f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))
            lines.append(f"  {row[0]:<{width}}{''.join(cells)}".rstrip())
    return "\n".join(lines[1:])


def _cell(estimate: dict | None) -> str:
    value = text.percent(text.value_of(estimate))
    return f"{value} {text.interval(estimate, 100):<15}"
