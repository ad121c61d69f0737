"""One table of the same study under several seeds, from its results.json files.

    python tools/seeds.py runs/seed-*/demo-remedies/report/results.json [--against rl] [--markdown FILE]
        [--figure FILE.png]

For every set of problems a row of each model: accuracy, pass@k at the largest k, and, where the model is compared with
a base model, the fate of the questions that the base model solves never, [0], or rarely, [1–4]: the share of [0] that
leave it and the share of [1–4] that fall to [0], each with what sampling noise alone would give, and the mean gain in
success rate of every bin. All in percent: the mean over seeds with its 95% t-interval. --against: a second table, of
each model less this one, paired by seed (and so with the same draws of the same base model). --figure: accuracy against
pass@k, a point with both intervals for each model, a panel for each set of problems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from matplotlib.figure import Figure

from rlvd_jax.errors import UserError, nearest
from rlvd_jax.report import figures
from rlvd_jax.report.text import DASH, number, shorten

Row = dict[str, float]  # by column, in percent; not a number where undefined


def load(paths: Sequence[str | Path]) -> list[dict]:
    """The results in the order of their seeds; UserError if they are not of one study under different seeds."""
    found = {}
    for path in paths:
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
            settings = dict(results["settings"])
            seed = settings.pop("seed")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not the results.json of a study ({error!r:.80})") from None
        settings.pop("output", None)
        if seed in found:
            raise UserError(f"{path}: has seed {seed}, as {found[seed][0]} has: give each seed once")
        for other, _, theirs in found.values():
            if different := [k for k in settings.keys() | theirs.keys() if settings.get(k) != theirs.get(k)]:
                raise UserError(f"{path}: its setting '{min(different)}' is not that of {other}: only seeds may differ")
        found[seed] = path, results, settings
    return [found[seed][1] for seed in sorted(found)]


def fate(comparison: dict) -> Row:
    """What became of the base model's [0] and [1–4], and the gain of every bin."""
    moves = comparison["transitions"]
    (never, rarely), counts = moves["labels"][:2], np.array(moves["counts"], float)
    expected = np.array(moves["expected"], float)
    with np.errstate(invalid="ignore"):
        share, by_chance = (x[:2, 0] / counts[:2].sum(axis=1) for x in (counts, expected))
    row = {
        f"{never} left": 1 - share[0],
        "by noise": 1 - by_chance[0],
        f"{rarely} → {never}": share[1],
        "by noise ": by_chance[1],
    }
    row |= {f"gain {b['label']}": b["gain"]["value"] for b in comparison["bins"]}
    return {name: np.nan if value is None else 100 * value for name, value in row.items()}


def rows(results: dict, problems: str) -> dict[str, Row]:
    """Model → its row."""
    found, out = results["problems"][problems], {}
    for model, m in found["models"].items():
        out[model] = {
            "accuracy": 100 * m["accuracy"]["value"],
            f"pass@{m['pass']['k'][-1]}": 100 * m["pass"]["value"][-1],
        }
        comparison = next((c for c in found["comparisons"].values() if c["other"] == model), None)
        out[model] |= fate(comparison) if comparison else {}
    return out


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the defined values and half the width of its 95% t-interval; not a number where there are too few."""
    values = np.array([v for v in values if np.isfinite(v)])
    if len(values) < 2:
        return (values[0] if len(values) else np.nan), np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))


def cell(values: Sequence[float], sign: bool) -> str:
    """`42.3 ±1.8`, a dash where it is undefined."""
    middle, half = mean(values)
    if np.isnan(middle):
        return DASH
    return number(middle, sign=sign) + ("" if np.isnan(half) else f" ±{number(half)}")


def table(of_seeds: Sequence[dict[str, Row]], against: str | None = None) -> list[list[str]]:
    """Heading and rows of cells, from the rows of each seed; with `against`, less those of that model."""
    models = list(of_seeds[0])
    columns = list(dict.fromkeys(c for row in of_seeds[0].values() for c in row if not (against and "noise" in c)))
    if against:
        models = [m for m in models if m != against and of_seeds[0][m].keys() == of_seeds[0][against].keys()]
    lines = [["model", *(c.strip() for c in columns)]]
    for model in models:
        cells = []
        for c in columns:
            less = [rows[against].get(c, np.nan) if against else 0.0 for rows in of_seeds]
            values = [rows[model].get(c, np.nan) - x for rows, x in zip(of_seeds, less, strict=True)]
            cells.append(cell(values, sign=bool(against) or c.startswith("gain")))
        lines.append([model, *cells])
    return lines


def figure(of_seeds: Sequence[dict], subtitle: str) -> Figure:
    """Mean accuracy and pass@k of each model with 95% t-intervals over seeds, a panel for each set of problems.

    of_seeds: the results of each seed. To be drawn and saved within `figures.style()`.
    """
    sets = of_seeds[0]["problems"]
    look = figures.looks(dict.fromkeys(m for found in sets.values() for m in found["models"]))
    width, height = 3.3 * len(sets) + 1.9, 4.0  # inches
    drawn = Figure(figsize=(width, height))
    drawn.text(0.12 / width, 0.97, "Accuracy and capability", fontsize=10.5, weight="bold", va="top")
    drawn.text(0.12 / width, 0.915, shorten(subtitle, 90), fontsize=8.5, color=figures.MUTED, va="top")
    panels = drawn.subplots(1, len(sets), squeeze=False)[0]
    right = 1 - 1.85 / width
    drawn.subplots_adjust(left=0.6 / width, right=right, top=0.8, bottom=0.45 / height, wspace=0.24)
    handles = {}
    for ax, (problems, found) in zip(panels, sets.items(), strict=True):
        of_models = [rows(r, problems) for r in of_seeds]
        for model, row in of_models[0].items():
            columns = list(row)[:2]
            (x, dx), (y, dy) = (mean([r[model][c] for r in of_models]) for c in columns)
            m = look[model]
            handles[model] = ax.errorbar(
                x, y, np.nan_to_num(dy), np.nan_to_num(dx), fmt=m.marker, color=m.color, elinewidth=1.1, label=m.label
            )
            ax.set_xlabel(f"{columns[0]}, %")
            ax.set_ylabel(f"{columns[1]}, %")
        ax.set_title(f"{problems}, {found['questions']:,} questions", fontsize=9, loc="left")
        ax.grid()
    place = {"loc": "upper left", "bbox_to_anchor": (right + 0.015, 0.8)}
    drawn.legend(handles=list(handles.values()), labelspacing=0.9, **place)
    return drawn


def plain(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--against", metavar="MODEL", help="a second table: each model less this one")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables there too, as Markdown")
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw accuracy against pass@k there")
    args = parser.parse_args(argv)
    try:
        of_seeds = load(args.results)
        seeds = ", ".join(str(r["settings"]["seed"]) for r in of_seeds)
        seeds = f"seed{'s' if len(of_seeds) > 1 else ''} {seeds}"
        written = []
        for problems, found in of_seeds[0]["problems"].items():
            tables = {f"{problems}, {found['questions']} questions, {seeds}": None}
            if args.against:
                if args.against not in found["models"]:
                    raise UserError(
                        f"--against: '{args.against}' is not a model{nearest(args.against, found['models'])}"
                    )
                tables[f"{problems}, less {args.against}"] = args.against
            for title, against in tables.items():
                lines = table([rows(r, problems) for r in of_seeds], against)
                print(f"{title}\n{plain(lines)}\n")
                written.append(f"{title}\n\n{markdown(lines)}\n")
        if args.markdown:
            args.markdown.write_text("\n".join(written), encoding="utf-8")
        if args.figure:
            with figures.style():
                args.figure.write_bytes(figures.png(figure(of_seeds, f"{seeds}: means, 95% t-intervals"), dpi=110))
    except UserError as error:
        print(f"seeds: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
