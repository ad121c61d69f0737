"""The paper's figures, from the results of `rlvd_jax.evaluation`, and their SVG (for the page), PNG and PDF.

A figure is about half a page wide: two stand side by side on a screen, one fills a telephone's. Colours follow the
model through all figures and stay apart for colour-blind eyes; markers differ as well. The SVG names its colours
by CSS variables with a light and a dark value, so that it follows the reader's scheme, and leaves its letters to
the reader's own fonts.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rlvd_jax.report.text import number, percent, shorten, visible

# Each colour on white paper and its partner on the dark page. The light one also names it inside the SVG.
INK, MUTED, GRID, PAPER = "#1d2126", "#656c76", "#e4e7ec", "#fffffe"
HEAT, ON_HEAT = "#2373d5", "#fffffd"  # of heat maps, and of the letters on its full strength
SERIES = {
    "#858c94": "#b9c1cd",  # grey
    "#2474d6": "#5b96ff",  # blue
    "#dd571c": "#f0641e",  # vermilion
    "#10563a": "#8ff0b0",  # green
    "#9c1f8a": "#cf72bd",  # purple
    "#e3a400": "#f0c419",  # amber
    "#5cbbe6": "#3b7f9f",  # sky
    "#701c10": "#ff9d94",  # maroon
    "#8d82f2": "#9556e6",  # violet
    "#a07c8c": "#a8845f",  # mauve
}
DARK = {
    INK: "#e8eaed",
    MUTED: "#9aa3af",
    GRID: "#2d333c",
    PAPER: "#171a20",
    HEAT: "#2f6fe0",
    ON_HEAT: "#ffffff",
    **SERIES,
}
MARKERS = "osD^vPX<>*"

WIDTH, HEIGHT = 5.6, 3.9  # inches of one figure
FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif'
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.1,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlvd",
}


@dataclass(frozen=True)
class Look:
    """How one model is drawn, everywhere."""

    label: str
    color: str
    marker: str
    dash: str

    @property
    def dark(self) -> str:
        return DARK[self.color]


def looks(models) -> dict[str, Look]:
    """A look for each model, in their order; the eleventh model and on repeat the colours with dashed lines."""
    colors = list(SERIES)
    return {
        m: Look(
            visible(shorten(m, 24)),
            colors[i % len(colors)],
            MARKERS[i % len(MARKERS)],
            ("-", "--", ":", "-.")[i // len(colors) % 4],
        )
        for i, m in enumerate(models)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def style():
    """The context in which figures are drawn and saved; nothing of the caller's matplotlib settings changes."""
    default = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return matplotlib.rc_context(default | STYLE)


def png(figure: Figure, dpi: int = 200) -> bytes:
    return _saved(figure, format="png", dpi=dpi)


def pdf(figure: Figure) -> bytes:
    return _saved(figure, format="pdf", metadata={"CreationDate": None})


def svg(figure: Figure) -> bytes:
    """A standalone SVG that follows the reader's light or dark scheme and uses the reader's fonts."""
    text = _saved(figure, format="svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    names = {color: f"--c{i}" for i, color in enumerate(DARK)}
    text = re.sub("|".join(names), lambda m: f"var({names[m[0]]})", text)
    text = text.replace("'DejaVu Sans'", "var(--font)")

    def scheme(dark):
        return "".join(f"{name}:{DARK[color] if dark else color};" for color, name in names.items())

    rules = f"svg{{--font:{FONTS};{scheme(False)}}}@media(prefers-color-scheme:dark){{svg{{{scheme(True)}}}}}"
    return text.replace("<defs>", f"<style>{rules}</style><defs>", 1).encode()


def _saved(figure, **options) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in letters that the font lacks
        figure.savefig(buffer, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _figure(title, subtitle, height=HEIGHT) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    points = 72 * height
    figure.text(10 / (72 * WIDTH), 1 - 10 / points, title, fontsize=10.5, weight="bold", va="top")
    figure.text(10 / (72 * WIDTH), 1 - 25 / points, visible(shorten(subtitle, 78)), fontsize=8.5, color=MUTED, va="top")
    return figure


def _height(rows) -> float:
    """Inches of a figure with a row for each model."""
    return max(2.6, (130 + 22 * rows) / 72)


def _axes(figure, left=44, right=12, top=66, bottom=34):
    """Axes with margins in points, so that labels have the same room whatever the figure's size."""
    width, height = 72 * figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def _legend(figure, handles):
    """One line of names below the titles, in smaller letters where they are long."""
    width, height = 72 * figure.get_size_inches()
    needed = sum(5.2 * len(h.get_label()) + 26 for h in handles)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(10 / width, 1 - 44 / height),
        ncol=len(handles),
        fontsize=8.5 * min(1, (width - 20) / needed),
    )


def _arrays(estimates):
    """value, low, high of a list of estimates as float arrays, NaN where null."""
    rows = [[(e or {}).get(key) for key in ("value", "low", "high")] for e in estimates]
    return np.array(rows, float).reshape(-1, 3).T


def _errors(value, low, high):
    """Lengths of the error bars for matplotlib; 0 where an interval is missing."""
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


def _bars(ax, x, estimates, width, color, scale=1, soft=False):
    value, low, high = scale * _arrays(estimates)
    ok = np.isfinite(value)
    x = np.asarray(x, float)[ok]
    value, low, high = value[ok], low[ok], high[ok]
    if soft:
        ax.bar(x, value, width, color=color, alpha=0.28)
        ax.bar(x, value, width, facecolor="none", edgecolor=color, linewidth=0.9)
    else:
        ax.bar(x, value, width, color=color)
    ax.errorbar(x, value, _errors(value, low, high), fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.8, capthick=0.9)


def _percent_axis(axis):
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}%"))


def _spread(wanted, gap, low, high):
    """Positions near `wanted`, at least `gap` apart and within [low, high] as far as there is room."""
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(wanted))
    # Least-squares positions with a minimum gap: isotonic regression of the positions less their offsets.
    blocks = []
    for value in np.asarray(wanted, float)[order] - offsets:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    placed = np.repeat([b[0] for b in blocks], [b[1] for b in blocks])
    placed = np.clip(placed, low, high - offsets[-1]) + offsets
    out = np.empty(len(wanted))
    out[order] = placed
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Several models on one set of problems


def overview(models: dict, look: dict[str, Look], subtitle: str) -> Figure:
    """Accuracy, maj@n and pass@n of each model with their intervals: the distance between first and last is what
    the model can but seldom does."""
    names, labels = list(models), _row_labels(models, look)
    label = 5.6 * max(map(len, labels)) + 16
    figure = _figure("Accuracy, majority and capability", subtitle, _height(len(names)))
    ax = _axes(figure, left=label)
    n, k = counts(models.values())
    kinds = (("accuracy", "o", "accuracy"), ("maj", "D", f"maj@{n}"), ("pass", "s", f"pass@{k}"))
    for row, m in enumerate(names):
        color = look[m].color
        values = {}
        for (kind, marker, _), shift in zip(kinds, (-0.17, 0, 0.17), strict=True):
            value, low, high = 100 * _arrays([pass_estimate(models[m]) if kind == "pass" else models[m][kind]])
            if not np.isfinite(value[0]):
                continue
            values[kind] = value[0]
            ax.errorbar(
                value, [row + shift], xerr=_errors(value, low, high), fmt=marker, markersize=5.5, color=color,
                markerfacecolor=color if kind == "accuracy" else PAPER, markeredgewidth=1.2, elinewidth=1.1, zorder=3,
            )  # fmt: skip
        if values:
            ax.plot([min(values.values()), max(values.values())], [row, row], color=color, linewidth=5, alpha=0.16)
    ax.set_yticks(range(len(names)), labels, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-2, 102)
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    _percent_axis(ax.xaxis)
    _legend(
        figure,
        [
            Line2D([], [], linestyle="", marker=marker, markersize=5.5, color=MUTED, label=text,
                   markerfacecolor=MUTED if kind == "accuracy" else PAPER)
            for kind, marker, text in kinds
        ],
    )  # fmt: skip
    return figure


def counts(models) -> tuple[str, str]:
    """Responses to each question, and the largest k of pass@k, where the models share them; else the letter n."""
    models = list(models)
    shared = {m["samples"] for m in models}, {m["pass"]["k"][-1] for m in models if m["pass"]["k"]}
    return tuple(f"{values.pop():,}" if len(values) == 1 else "n" for values in shared)


def fewer(models: dict) -> dict[str, str]:
    """The models that have fewer responses to each question than others of them, and how many: `8 responses`. What
    depends on this number is not compared between them and the others."""
    extents = {m: (r["fewest_samples"], r["samples"]) for m, r in models.items()}
    most = max(extents.values())
    return {m: f"{spell(models[m])} response{'s' * (e != (1, 1))}" for m, e in extents.items() if e != most}


def spell(model: dict) -> str:
    """A model's number of responses to each question, `6–8` where it differs between questions."""
    low, high = model["fewest_samples"], model["samples"]
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def shared_ks(models) -> list[int]:
    """The k at which tables show pass@k of these models: the largest that all have and the largest of any; not 1
    beside another, since pass@1 is the accuracy."""
    ends = {m["pass"]["k"][-1] for m in models if m["pass"]["k"]}
    return sorted({min(ends), max(ends)} - {1}) or [1] if ends else []


def _row_labels(models: dict, look: dict[str, Look]) -> list[str]:
    few = fewer(models)
    return [f"{shorten(look[m].label, 18)} ({few[m]})" if m in few else look[m].label for m in models]


def pass_estimate(model: dict, k: int | None = None) -> dict | None:
    """pass@k as an estimate, at the largest k if none is given; None where the model has fewer responses."""
    curve = model.get("pass") or {}
    if not curve.get("k") or (k is not None and k not in curve["k"]):
        return None
    at = -1 if k is None else curve["k"].index(k)
    return {key: curve[key][at] for key in ("value", "low", "high")}


def pass_curves(curves: dict[str, dict], look: dict[str, Look], title: str, subtitle: str) -> Figure:
    """pass@k against k on a logarithmic axis, with interval bands, each curve named at its end."""
    names = list(curves)
    longest = [m for m in names if curves[m]["k"][-1] == max(c["k"][-1] for c in curves.values())]
    label = 5.4 * max(len(look[m].label) for m in longest) + 26
    figure = _figure(title, subtitle)
    ax = _axes(figure, right=label, top=50)
    ends, lowest, top = [], 1.0, 1
    for m in names:
        k = np.array(curves[m]["k"], float)
        value, low, high = (np.array(curves[m][key], float) for key in ("value", "low", "high"))  # null becomes NaN
        ax.fill_between(
            k, 100 * low, 100 * high, color=look[m].color, alpha=0.13 if len(names) < 5 else 0.08, linewidth=0
        )
        powers = np.log2(k) % 1 == 0  # markers at the powers of two and at the end, wherever else the curve is known
        powers[-1] = True
        ax.plot(k, 100 * value, look[m].dash, color=look[m].color, linewidth=1.7)
        ax.plot(k[powers], 100 * value[powers], look[m].marker, color=look[m].color, markersize=3.4)
        if m in longest:
            ends.append((k[-1], 100 * value[-1]))
        lowest, top = min(lowest, *np.nan_to_num(np.concatenate([low, value]), nan=1)), max(top, k[-1])
    bottom = 10 * np.floor(10 * lowest) if lowest > 0.3 else -2
    ax.set_ylim(bottom, 102)
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.93, max(top, 1.1) * 1.04)
    doublings = int(np.log2(top))
    ax.set_xticks([2**i for i in range(0, doublings + 1, 1 + doublings // 5)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    _percent_axis(ax.yaxis)
    ax.grid(axis="y")
    ax.set_xlabel("k: responses to each question")
    # Names at the right edge, moved apart where curves end together, a thin line back to the curve's end.
    height = 72 * figure.get_size_inches()[1] * ax.get_position().height
    place = _spread([y for _, y in ends], 11.5 / height * (102 - bottom), bottom + 1, 101)
    for m, end, at in zip(longest, ends, place, strict=True):
        _name(ax, look[m], end, 14, at)
    _name_shorter(ax, {m: c for m, c in curves.items() if m not in longest}, curves, look)
    return figure


def _name(ax, look: Look, end, offset, y, align="left"):
    """A curve's name `offset` points from its end and at height y, a thin line between."""
    ax.annotate(
        look.label, end, (offset, y), textcoords=("offset points", "data"), va="center", ha=align, fontsize=8.5,
        color=look.color, annotation_clip=False,
        arrowprops={"arrowstyle": "-", "color": look.color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3,
                    "relpos": (0 if align == "left" else 1, 0.5)},
    )  # fmt: skip


def _name_shorter(ax, shorter: dict[str, dict], curves: dict[str, dict], look: dict[str, Look]):
    """Names of curves that end before others do. Curves only rise, so that nothing is drawn to the left of a point
    above all of them, nor to the right of one below them: the names stand there, where there is more room."""
    if not shorter:
        return
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    width, height = (72 * inches for inches in ax.figure.get_size_inches() * ax.get_position().size)
    step = 11.5 / height * (top - bottom)
    doubling = width / np.log2(right / left)  # points

    def bound(key, pick, k):
        """The highest or lowest of the bands at k, of curves that end before it at their end."""
        at = (100 * (c[key][i] if c[key][i] is not None else c["value"][i] or 0)
              for c in curves.values() for i in [min(k, len(c["k"])) - 1])  # fmt: skip
        return pick(at)

    ends = {m: (c["k"][-1], 100 * (c["value"][-1] or 0)) for m, c in shorter.items()}
    names = sorted(shorter, key=lambda m: ends[m][1])
    # Above: the names end left of the first end, or where they fit between it and the axis.
    needed = 5.4 * max(len(look[m].label) for m in names) + 6
    edge = max(doubling * np.log2(min(x for x, _ in ends.values()) / left) - 10, needed)
    over = bound("high", max, int(np.ceil(max(left * 2 ** (edge / doubling), max(x for x, _ in ends.values())))))
    under = bound("low", min, min(x for x, _ in ends.values()))
    above = top - over >= min(under - bottom, step * (len(names) + 0.6))
    for i, m in enumerate(names):
        x, _ = ends[m]
        at = doubling * np.log2(x / left)
        if above:
            _name(ax, look[m], ends[m], edge - at, over + step * (i + 0.8), "right")
        else:
            _name(ax, look[m], ends[m], 10, under - step * (len(names) - i - 0.2))


def success_counts(models: dict, labels: list[str], look: dict[str, Look], subtitle: str) -> Figure:
    """How many questions fall into each success bin, a stacked bar for each model."""
    names, rows = list(models), _row_labels(models, look)
    label = 5.6 * max(map(len, rows)) + 16
    figure = _figure("Questions by number of correct responses", subtitle, _height(len(names)))
    ax = _axes(figure, left=label)
    questions = np.array([models[m]["bins"] for m in names], float)
    share = 100 * questions / np.maximum(questions.sum(1, keepdims=True), 1)
    start = np.cumsum(share, 1) - share
    shades = np.linspace(0.08, 1, len(labels))
    for b, alpha in enumerate(shades):
        ax.barh(range(len(names)), share[:, b], 0.7, start[:, b], color=HEAT, alpha=alpha, linewidth=0)
        for row in range(len(names)):
            if share[row, b] >= 4:
                ax.text(
                    start[row, b] + share[row, b] / 2, row, f"{questions[row, b]:,.0f}", ha="center", va="center",
                    fontsize=8, color=INK if alpha < 0.5 else ON_HEAT,
                )  # fmt: skip
    ax.set_yticks(range(len(names)), rows, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.spines[["left", "bottom"]].set_visible(False)
    _percent_axis(ax.xaxis)
    ax.set_xlabel("share of the questions")
    _legend(figure, [Patch(facecolor=HEAT, alpha=a, label=text) for a, text in zip(shades, labels, strict=True)])
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# One model against another


def _two(comparison, look):
    return look[comparison["base"]], look[comparison["other"]]


def _bin_ticks(ax, bins):
    ax.set_xticks(range(len(bins)), [f"{b['label']}\n{b['questions']:,}" for b in bins], linespacing=1.35, fontsize=8)
    ax.set_xlim(-0.6, len(bins) - 0.4)


def bins(comparison: dict, look: dict[str, Look], subtitle: str, published: dict[str, float] | None = None) -> Figure:
    """Mean success rate in each bin of the base model's success counts, for both models, and their difference below,
    beside the paper's gains by bin where they are known."""
    base, other = _two(comparison, look)
    rows = comparison["bins"]
    figure = _figure("Success rate by the base model's bin", subtitle, HEIGHT + 0.7)
    x = np.arange(len(rows))
    upper, lower = _axes(figure, bottom=172), _axes(figure, top=182, bottom=48)
    _bars(upper, x - 0.19, [b["base"] for b in rows], 0.36, base.color, 100)
    _bars(upper, x + 0.19, [b["other"] for b in rows], 0.36, other.color, 100)
    upper.set_ylim(0, 104)
    upper.set_xticks([])
    upper.set_xlim(-0.6, len(rows) - 0.4)
    _bars(lower, x, [b["gain"] for b in rows], 0.5, other.color, 100)
    value, low, high = 100 * _arrays([b["gain"] for b in rows])
    paper = [100 * (published or {}).get(b["label"], np.nan) for b in rows]
    lower.plot(x + 0.36, paper, "D", markersize=4.5, color=INK, markerfacecolor=PAPER, markeredgewidth=1.1)
    shown = np.concatenate([value, low, high, paper, [0]])
    bottom, top = np.nanmin(shown), np.nanmax(shown)
    room = max(top - bottom, 2)
    for i in np.flatnonzero(np.isfinite(value)):
        up = value[i] >= 0
        edge = np.nanmax([value[i], high[i]]) if up else np.nanmin([value[i], low[i]])
        lower.annotate(
            number(value[i], 1, sign=True), (i, edge), (0, 3 if up else -3), textcoords="offset points", ha="center",
            va="bottom" if up else "top", fontsize=8.5, weight="bold",
        )  # fmt: skip
    lower.set_ylim(bottom - (0.2 * room if np.nanmin(np.append(value, 0)) < 0 else 0.04 * room), top + 0.2 * room)
    lower.axhline(0, color=MUTED, linewidth=0.8)
    lower.spines["bottom"].set_visible(False)
    lower.set_ylabel("gain, points")
    _bin_ticks(lower, rows)
    lower.set_xlabel("correct responses of the base model, and number of questions", labelpad=3)
    lower.yaxis.set_major_locator(MaxNLocator(4))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, 0, sign=True)))
    _percent_axis(upper.yaxis)
    for ax in (upper, lower):
        ax.grid(axis="y")
    handles = [Patch(color=m.color, label=m.label) for m in (base, other)]
    if published:
        handles.append(Line2D([], [], linestyle="", marker="D", markersize=4.5, color=INK, markerfacecolor=PAPER,
                              label="the paper's gain"))  # fmt: skip
    _legend(figure, handles)
    return figure


def transitions(comparison: dict, look: dict[str, Look], subtitle: str) -> Figure:
    """Where the questions of each base bin are with the other model: row percentages, counts below them."""
    base, other = _two(comparison, look)
    table = comparison["transitions"]
    labels, counts, shares = table["labels"], table["counts"], table["percent"]
    size = len(labels)
    figure = _figure("Transitions between success bins", subtitle, HEIGHT + 0.7)
    ax = _axes(figure, left=74, top=86, bottom=14)
    for i, j in itertools.product(range(size), range(size)):
        share = (shares[i][j] or 0) / 100
        ax.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, color=HEAT, alpha=0.05 + 0.9 * share, linewidth=0))
        if i == j:
            ax.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, fill=False, edgecolor=MUTED, linewidth=0.9))
        if counts[i][j]:
            color = ON_HEAT if share > 0.5 else INK
            ax.text(j + 0.5, i + 0.42, f"{percent(share)}%", ha="center", va="center", fontsize=8.5, color=color)
            ax.text(
                j + 0.5, i + 0.73, f"{counts[i][j]:,}", ha="center", va="center", fontsize=7.5, color=color, alpha=0.75
            )
    ax.set_xlim(0, size)
    ax.set_ylim(size, 0)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xticks(np.arange(size) + 0.5, labels)
    ax.set_yticks(np.arange(size) + 0.5, labels)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(f"correct responses of {other.label}", color=INK)
    ax.set_ylabel(f"correct responses of {base.label}", color=INK)
    return figure


def entropy(comparison: dict, look: dict[str, Look], subtitle: str) -> Figure:
    """Mean entropy (nats) of the final answers, over all questions and in each base bin, of both models."""
    base, other = _two(comparison, look)
    rows = comparison["bins"]
    figure = _figure("Entropy of the final answers", subtitle)
    ax = _axes(figure, bottom=48)
    x = np.concatenate([[0], np.arange(len(rows)) + 1.4])
    for key, m, shift in (("base", base, -0.19), ("other", other, 0.19)):
        estimates = [comparison["values"][key]["entropy"], *(b[f"entropy_{key}"] for b in rows)]
        _bars(ax, x + shift, estimates, 0.36, m.color)
    questions = sum(b["questions"] for b in rows)
    ax.set_xticks(
        x, [f"all\n{questions:,}", *(f"{b['label']}\n{b['questions']:,}" for b in rows)], linespacing=1.35, fontsize=8
    )
    ax.axvline(0.7, color=GRID, linewidth=0.8)
    ax.set_xlim(-0.6, x[-1] + 0.6)
    ax.set_ylabel("nats")
    ax.grid(axis="y")
    ax.set_xlabel("correct responses of the base model, and number of questions", labelpad=3)
    _legend(figure, [Patch(color=m.color, label=m.label) for m in (base, other)])
    return figure


def style_by_correctness(
    comparison: dict, models: dict, look: dict[str, Look], what: str, unit: str, subtitle: str
) -> Figure:
    """Mean `what` ("length" or "keywords"), in units of that name, of correct and of incorrect responses, overall and
    by the base model's successes."""
    base, other = _two(comparison, look)
    table = comparison["style"]
    title = {"length": "Response length", "keywords": "Reflection phrases"}[what]
    figure = _figure(title, subtitle)
    ax = _axes(figure, left=50, bottom=36)
    groups = 1 + len(table["labels"])
    x = np.arange(groups) + 0.4 * (np.arange(groups) > 0)
    for key, m, shift in (("base", base, -0.31), ("other", other, 0.11)):
        for kind, step, soft in (("correct", 0, False), ("incorrect", 0.2, True)):
            estimates = [models[comparison[key]][what][kind], *table[what][key][kind]]
            _bars(ax, x + shift + step, estimates, 0.18, m.color, soft=soft)
    ax.set_xticks(x, ["all", *table["labels"]])
    ax.axvline(0.7, color=GRID, linewidth=0.8)
    ax.set_xlim(-0.6, x[-1] + 0.6)
    ax.set_ylabel(unit if what == "length" else f"{unit} in a response")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    ax.grid(axis="y")
    ax.set_xlabel("correct responses of the base model", labelpad=3)
    _legend(
        figure,
        [
            Patch(color=base.color, label=base.label),
            Patch(color=other.color, label=other.label),
            Patch(color=MUTED, label="correct"),
            Patch(facecolor=(*matplotlib.colors.to_rgb(MUTED), 0.28), edgecolor=MUTED, label="incorrect"),
        ],
    )
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Training


def progress(run: dict, look: Look, subtitle: str) -> Figure:
    """Accuracy with its interval and mean response length at each evaluated step; the kept checkpoint ringed."""
    figure = _figure("Training progress", subtitle, HEIGHT + 0.7)
    upper, lower = _axes(figure, top=50, bottom=146), _axes(figure, top=214, bottom=34)
    step = np.array(run["step"], float)
    value, low, high = (100 * np.array(run[key], float) for key in ("accuracy", "low", "high"))  # null becomes NaN
    length = np.array(run["length"], float)
    upper.fill_between(step, low, high, color=look.color, alpha=0.18, linewidth=0)
    for ax, y in ((upper, value), (lower, length)):
        ax.plot(step, y, "-" + look.marker, color=look.color, linewidth=1.7, markersize=4.5)
    if run.get("kept") in run["step"]:
        at = run["step"].index(run["kept"])
        for ax, y in ((upper, value), (lower, length)):
            ax.axvline(step[at], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
            ax.plot(
                step[at], y[at], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.2
            )
        right = at < len(step) / 2
        upper.annotate("kept", (step[at], upper.get_ylim()[0]), (5 if right else -5, 4), textcoords="offset points",
                       ha="left" if right else "right", fontsize=8.5, color=MUTED)  # fmt: skip
    if np.isfinite(length).any():
        lower.set_ylim(0, 1.25 * np.nanmax(length))
    upper.set_ylabel("accuracy")
    lower.set_ylabel("tokens")
    lower.set_xlabel("training step")
    upper.tick_params(labelbottom=False)
    _percent_axis(upper.yaxis)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for ax in (upper, lower):
        ax.grid(axis="y")
        ax.set_xlim(step.min() - 0.03 * np.ptp(step) - 0.5, step.max() + 0.03 * np.ptp(step) + 0.5)
    return figure
