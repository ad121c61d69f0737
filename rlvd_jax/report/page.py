"""The page: what of the results goes where, and the template that shows it (`page.html`).

Names and settings come from users and responses from models: the template escapes everything, control characters are
made visible, and the page's own policy lets nothing load and no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources

import jinja2
import yaml
from markupsafe import Markup

from rlvd_jax.config import GRPOConfig
from rlvd_jax.evaluation import difficulty
from rlvd_jax.report import figures, prose
from rlvd_jax.report.text import DASH, interval, number, percent, value_of, visible

LONGEST = 20_000  # characters of a response that the page shows
MARKS = {"shown": "✓", "not shown": "✕", "unclear": "?", "correct": "✓", "wrong": "✕", "ungraded": "?"}
VARIANTS = ("advantage", "normalise", "clip_low", "clip_high", "ratio", "kl", "entropy", "updates")
VARIANTS += ("dynamic_sampling", "hard_samples", "solved_by", "solved_samples")
"""Settings of GRPO that are told where they are not the default."""
CLAIMS = {"rl": "RL", "new_knowledge": "new knowledge", "reasoning_only": "reasoning only"}


@dataclass(frozen=True)
class Drawn:
    """A figure on the page and in its files."""

    name: str
    title: str
    caption: str
    image: str  # the SVG as a data: URL
    width: int
    height: int
    files: dict[str, bytes]  # by ending: png, pdf


class Drawer:
    """Saves figures once in every format, under a file name of its own for each."""

    def __init__(self):
        self.drawn: dict[str, Drawn] = {}

    def __call__(self, figure, caption: str, *name: str) -> Drawn:
        stem = slug(*name)
        name = next(n for i in itertools.count(1) if (n := stem if i == 1 else f"{stem}-{i}") not in self.drawn)
        width, height = (round(100 * inches) for inches in figure.get_size_inches())
        image = "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure)).decode()
        files = {"png": figures.png(figure), "pdf": figures.pdf(figure)}
        self.drawn[name] = Drawn(name, figure.texts[0].get_text(), caption, image, width, height, files)
        return self.drawn[name]


def slug(*parts: str) -> str:
    """A file name and page address from any text."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") or "x" for part in parts)


def render(results: dict, samples: dict[str, Sequence[dict]]) -> tuple[str, list[Drawn]]:
    """The page as text, and its figures."""
    names = list(dict.fromkeys([*results["models"], *(m for p in results["problems"].values() for m in p["models"])]))
    look = figures.looks(names)
    draw = Drawer()
    with figures.style():
        problems = [_problems(name, p, look, draw, results) for name, p in results["problems"].items() if p["models"]]
        progress = [
            draw(figures.progress(run, look[m], f"{m} · evaluated while training"), prose.progress(run), m, "progress")
            for m, run in (results.get("progress") or {}).items()
            if m in look and any(a is not None for a in run["accuracy"])
        ]
    headline = prose.headline(results)
    package = resources.files(__package__)
    script = package.joinpath("page.js").read_text(encoding="utf-8")
    settings = results.get("settings")
    context = {
        "study": results.get("study") or "Evaluation",
        "facts": _facts(results),
        "summary": prose.summary(results),
        "headline": headline,
        "tiles": _tiles(results["problems"].get(headline)),
        "claims": _claims(results),
        "tally": Counter(c["verdict"] for c in results.get("claims") or ()),
        "recipes": [_recipe(m, results) for m in names],
        "problems": problems,
        "ks": _ks(results),
        "published": any(row["published"] for p in problems for row in p["rows"]),
        "length_unit": results.get("length_unit", "tokens"),
        "remarks": results.get("notes") or (),
        "notes": _notes(results, {row["model"] for p in problems for row in p["rows"] if row["published"]}),
        "distillation": _distillation(results),
        "progress": progress,
        "samples": [_samples(m, responses) for m, responses in samples.items() if responses],
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100) if settings else "",
        "versions": (results.get("versions") or {}).items(),
        "look": look,
    }
    context["contents"] = _contents(context)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    template = environment.from_string(package.joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(
        context,
        css=Markup(package.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        marks=MARKS,
        verdicts=prose.VERDICTS,
        dash=DASH,
        number=number,
        percent=percent,
        interval=interval,
        moved=prose.moved,
        value_of=value_of,
        scaled=lambda e, scale: None if value_of(e) is None else scale * value_of(e),
    )
    return page, list(draw.drawn.values())


def _contents(context) -> list[dict]:
    entries = [("summary", "Summary", [])]
    if context["claims"]:
        entries.append(("claims", "Claims", []))
    entries.append(("run", "What was run", []))
    if context["problems"]:
        entries.append(("table", "Accuracy and capability", []))
    if context["distillation"]:
        entries.append(("self-distillation", "Self-distillation", []))
    for p in context["problems"]:
        parts = [{"id": c["id"], "title": f"{c['base']} → {c['other']}"} for c in p["comparisons"]]
        entries.append((p["id"], p["name"], parts))
    if context["progress"]:
        entries.append(("progress", "Training progress", []))
    if context["samples"]:
        entries.append(("responses", "Sample responses", []))
    entries += [("repeat", "Settings and versions", []), ("glossary", "Glossary", [])]
    return [{"id": i, "title": title, "parts": parts} for i, title, parts in entries]


def _facts(results) -> list[tuple[str, str]]:
    problems = results["problems"].values()
    models = {m for p in problems for m in p["models"]}
    counts = {
        "model": len(models),
        "question": sum(p["questions"] for p in problems),
        "response": sum(m["responses"] for p in problems for m in p["models"].values()),
    }
    facts = [tuple(prose.counted(n, noun).split()) for noun, n in counts.items()]
    if results.get("created"):
        try:
            date = datetime.fromisoformat(results["created"])
            facts.append((f"{date.day} {date:%B %Y}", f"{date:%H:%M %Z}".strip()))
        except ValueError:
            facts.append((results["created"], ""))
    return facts


def _ks(results) -> list[int | None]:
    """The k of the columns of pass@k for all models; None, the model's own n, where those on the same problems have
    equally many responses."""
    sets = [p["models"] for p in results["problems"].values() if p["models"]]
    if not any(map(figures.fewer, sets)):
        return [None]
    return sorted({k for models in sets for k in figures.shared_ks(models.values())})


def _recipe(model: str, results) -> dict:
    """How a model was made, in a sentence, from the study's settings where they are known."""
    known = results["models"].get(model) or {}
    declared = ((results.get("settings") or {}).get("models") or {}).get(model) or {}
    grpo, sft = declared.get("grpo"), declared.get("sft")
    if grpo:
        text = f"Reinforcement learning (GRPO) from {grpo.get('start')} on {grpo.get('problems')}"
        if grpo.get("steps"):
            text += f", {grpo['steps']:,} steps"
            if grpo.get("questions") and grpo.get("samples"):
                text += f" of {grpo['questions']:,} questions × {grpo['samples']:,} responses"
        fields = GRPOConfig.model_fields
        changed = {v: grpo[v] for v in VARIANTS if grpo.get(v) not in (None, fields[v].default)}
        if changed.get("advantage") == "pass_at_k":
            changed["advantage"] = f"pass_at_k with k {grpo.get('k', fields['k'].default)}"
        text += f"; {', '.join(f'{v} {value}' for v, value in changed.items())}" if changed else ""
    elif sft:
        student, teacher = sft.get("student"), sft.get("teacher")
        whose = "its own" if student == teacher else f"{teacher}'s"
        keep = f"up to {sft['keep']:,} of {whose}" if sft.get("keep") else whose
        text = f"{student} trained on {keep} correct responses to each question of {sft.get('problems')}"
        if sft.get("only_solved_by"):
            text += f" that {sft['only_solved_by']} ever solves"
    else:
        kinds = {"grpo": "Reinforcement learning (GRPO) from ", "sft": "Distilled from "}
        text = kinds.get(known.get("kind"), "") + str(known.get("from") or declared.get("from") or "given")
    return {"name": model, "text": text, "template": known.get("template"), "paper": known.get("paper")}


def _tiles(problems) -> list[dict]:
    """The comparisons as differences at a glance, those that carry a claim first."""
    comparisons = list(problems["comparisons"].values()) if problems else []
    return [
        {
            "base": c["base"],
            "other": c["other"],
            "rows": [(label, c["difference"][key]) for key, label in _metrics(c)],
            "sentence": prose.comparison(c),
        }
        for c in sorted(comparisons, key=lambda c: not c.get("claim"))
    ]


def _metrics(c) -> list[tuple[str, str]]:
    return [("accuracy", "accuracy"), ("maj", f"maj@{c['samples']:,}"), ("pass", f"pass@{c['k']:,}")]


def _claims(results) -> list[dict]:
    """Claims in groups by comparison, each once with its verdicts on every set of problems."""
    groups: dict[str, dict[str, dict]] = {}
    for c in results.get("claims") or ():
        claims = groups.setdefault(c.get("comparison") or "self-distillation", {})
        claim = claims.setdefault(c["id"], {key: _minus(c.get(key)) for key in ("claim", "source", "paper", "rule")})
        claim.setdefault("verdicts", []).append(c | {"evidence": _minus(c["evidence"])})
    return [{"title": key.replace("→", " → "), "claims": list(claims.values())} for key, claims in groups.items()]


def _minus(sentence: str | None) -> str:
    return re.sub(r"(?<![^\s\[(])-(?=\d)", "−", sentence or "")


def _published(results, problems: str, *key: str) -> dict | None:
    """What the paper published of a model or a comparison on these problems, by their name or the hub's."""
    found = results.get("published") or {}
    for part in key:
        found = found.get(part) or {}
    by_problems = found.get("problems", found)
    source = ((results.get("settings") or {}).get("problems") or {}).get(problems) or {}
    return by_problems.get(problems) or by_problems.get(source.get("hub"))


def _distillation(results) -> dict | None:
    """Tables 1 and 4, with the paper's accuracies where it has the same model."""
    rows = []
    for row in results.get("self_distillation") or ():
        splits = ("train", "test")
        published = [_published(results, row[f"{s}_problems"], "models", row["model"]) for s in splits]
        rows.append(
            row
            | {
                "setup": f"{row['student']} ← {row['teacher']}" if row.get("student") else row["model"],
                "published": [percent((p or {}).get("accuracy")) for p in published] if any(published) else None,
            }
        )
    published = any(row["published"] for row in rows)
    notes = _notes(results, {row["model"] for row in rows if row["published"]})
    return {"rows": rows, "published": published, "notes": notes} if rows else None


def _notes(results, models) -> list[str]:
    """What has to be said about the paper's numbers for these models."""
    published = (results.get("published") or {}).get("models") or {}
    return [f"{m}: {p['note']}" for m, p in published.items() if m in models and p.get("note")]


def _samples(model: str, responses) -> dict:
    shown = []
    for r in responses:
        whole = r["text"]
        cut = len(whole) - LONGEST
        if cut > 0:
            whole = f"{whole[: LONGEST // 2]}\n\n[… {cut:,} characters left out …]\n\n{whole[-(LONGEST // 2) :]}"
        verdict = {True: "correct", False: "wrong"}.get(r.get("correct"), "ungraded")
        side = [f"{r['tokens']:,} tokens"] if r.get("tokens") is not None else []
        side += ["cut off"] if r.get("stop") == "length" else []
        side += [f"bin {r['bin']}"] if r.get("bin") is not None else []
        shown.append(
            {
                "problem": r["problem"],
                "line": " ".join(r["problem"][:300].split()),
                "gold": r["gold"],
                "answer": DASH if r.get("answer") is None else r["answer"],
                "text": whole,
                "verdict": verdict,
                "side": " · ".join(side),
            }
        )
    correct = sum(r["verdict"] == "correct" for r in shown)
    return {"model": model, "responses": shown, "tally": f"{prose.counted(len(shown), 'response')}, {correct} correct"}


def _problems(name: str, p: dict, look, draw: Drawer, results) -> dict:
    """Everything about one set of problems: its table rows, its figures, its comparisons."""
    models = p["models"]
    samples = max(m["samples"] for m in models.values())
    few = figures.fewer(models)
    each = prose.counted(samples, "response")
    if few:
        each = f"{min(m['fewest_samples'] for m in models.values()):,}–{each}"
    what = f"{name} · {prose.counted(p['questions'], 'question')} × {each}"
    drawn = [draw(figures.overview(models, look, what), prose.overview(models), name, "overview")]
    pairs = [(c["base"], c["other"]) for c in p["comparisons"].values()]

    if samples > 1:
        found = {m: r["pass"] for m, r in models.items()}
        figure = figures.pass_curves(found, look, "pass@k", what)
        drawn.append(draw(figure, prose.pass_curves(found, pairs), name, "pass-at-k"))
        found = {m: r["pass_hardest"] for m, r in models.items() if r.get("pass_hardest")}
        if found:
            chosen = next(iter(found.values()))
            which = f"{name} · the {chosen['questions']:,} questions that {chosen['by']} solves least"
            figure = figures.pass_curves(found, look, "pass@k on the hardest questions", which)
            drawn.append(draw(figure, prose.pass_curves(found, pairs), name, "pass-at-k-hardest"))
        figure = figures.success_counts(models, difficulty.labels(samples), look, what)
        drawn.append(draw(figure, prose.success_counts(models), name, "success-counts"))
    return {
        "id": f"problems-{slug(name)}",
        "name": name,
        "questions": p["questions"],
        "samples": _samples_of(models) if few else f"{samples:,}",
        "mixed": bool(few),
        "responses": sum(m["responses"] for m in models.values()),
        "rows": [
            r
            | {
                "model": m,
                "n": figures.spell(r),
                "fewer": few.get(m),
                "passes": [figures.pass_estimate(r, k) for k in _ks(results)],
                "published": _published(results, name, "models", m),
            }
            for m, r in models.items()
        ],
        "figures": drawn,
        "comparisons": [
            _comparison(name, pair, c, models, look, draw, results) for pair, c in p["comparisons"].items()
        ],
    }


def _samples_of(models: dict) -> str:
    """`64 (base and rl), 8 (distilled)`: which models have how many responses to each question."""
    groups: dict[str, list[str]] = {}
    for m, r in models.items():
        groups.setdefault(figures.spell(r), []).append(m)
    return ", ".join(f"{n} ({prose.listed(names)})" for n, names in groups.items())


def _comparison(problems: str, pair: str, c: dict, models: dict, look, draw: Drawer, results) -> dict:
    base, other = c["base"], c["other"]
    published = _published(results, problems, "comparisons", pair) or {}
    what = f"{problems} · {base} → {other}"
    stem = (problems, base, "to", other)
    drawn = [
        draw(figures.bins(c, look, what, published.get("gain")), prose.bins(c, published.get("gain")), *stem, "bins"),
        draw(figures.transitions(c, look, what), prose.transitions(c, published.get("moves")), *stem, "transitions"),
        draw(figures.entropy(c, look, what), prose.entropy(c), *stem, "entropy"),
    ]
    for measure, unit in (("length", results.get("length_unit", "tokens")), ("keywords", "phrases")):
        figure = figures.style_by_correctness(c, models, look, measure, unit, what)
        drawn.append(draw(figure, prose.style_by_correctness(c, models, measure, unit), *stem, measure))
    both = c["values"]["base"], c["values"]["other"]
    return {
        "id": f"comparison-{slug(*stem)}",
        "base": base,
        "other": other,
        "claim": CLAIMS.get(c.get("claim"), c.get("claim")),
        "sentence": prose.comparison(c),
        "curves": prose.overtaken(c),
        "taken": prose.taken(c, models),
        "rows": [(label, both[0][key], both[1][key], c["difference"][key]) for key, label in _metrics(c)],
        "entropy": (both[0]["entropy"], both[1]["entropy"], c["difference"]["entropy"]),
        "figures": drawn,
    }
