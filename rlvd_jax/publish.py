"""From graded response sets to the page: answer groups, the analysis, sample responses, settings and versions."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rlvd_jax import __version__, report
from rlvd_jax.evaluation import Graded, analyse
from rlvd_jax.evaluation.difficulty import assign, labels
from rlvd_jax.grading import Grader
from rlvd_jax.responses import ResponseSet
from rlvd_jax.study import Study

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "math-verify",
    "latex2sympy2-extended",
    "sympy",
    "numpy",
    "pyarrow",
)
SHOWN = 10  # responses of each model on the page


def publish(study: Study, grader: Grader, progress=None, bars: bool = False) -> tuple[dict, Path]:
    """Analyse what has been sampled and write the page; → (results, path of the page).

    progress: called with one line on what is being done; bars: with progress bars where that takes more than a second.
    """
    say = progress or (lambda line: None)
    config = study.config
    graded: dict[str, dict[str, Graded]] = {}
    for (model, problems), samples in study.analysed.items():
        say(f"equal answers of {model} on {problems}")
        graded.setdefault(problems, {})[model] = collect(study, model, problems, samples, grader, bars)
    say("accuracy, capability, difficulty, intervals")
    comparisons = [
        {"base": c.base, "other": c.other, "problems": p, "claim": c.claim}
        for c in config.comparisons
        for p in c.problems
    ]
    results = analyse(
        graded,
        comparisons,
        progress={name: p for name in config.models if (p := training_progress(study, name))},
        models={name: describe(study, name) for name in config.models},
        hardest=config.hardest,
        bootstrap=config.bootstrap,
        seed=config.seed,
        self_distillation=self_distillation(study),
    )
    results = {
        "study": config.study,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": config.written(),
        "versions": versions(),
    } | results
    say("figures and page")
    page = report.write(results, study.report, shown(study, graded))
    return results, page


def collect(study: Study, model: str, problems: str, samples: int, grader: Grader, bar: bool = False) -> Graded:
    """One model's graded responses; the groups of equal answers are kept beside the set for the next time."""
    there = study.responses(model, problems)
    table = there.table(["problem_id", "sample", "text", "tokens", "stop", "answer", "correct"])
    table = table.filter(np.asarray(table["sample"]) < samples)
    ids = table["problem_id"].to_pylist()
    answers = table["answer"].to_pylist()
    groups = _groups(study, there, ids, answers, grader, bar)
    return Graded.from_columns(
        ids,
        table["correct"].to_pylist(),
        np.asarray(table["tokens"]),
        groups,
        texts=table["text"].to_pylist(),
        truncated=[stop == "length" for stop in table["stop"].to_pylist()],
        sample=np.asarray(table["sample"]),
        questions=[p.id for p in study.problems(problems)],
    )


def _groups(study: Study, there: ResponseSet, ids: list[str], answers: list, grader: Grader, bar: bool) -> np.ndarray:
    """For each response the number of its answer's group within its question."""
    key = hashlib.sha256(repr(list(zip(ids, answers, strict=True))).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = study.root / "analysis" / f"groups-{there.directory.name}-{key}.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there, or damaged
        return np.load(path)
    of_question: dict[str, list[int]] = {}
    for i, id in enumerate(ids):
        of_question.setdefault(id, []).append(i)
    groups = np.empty(len(ids), np.int32)
    with tqdm(total=len(of_question), unit="question", leave=False, delay=1, disable=not bar) as shown:
        found = grader.groups([[answers[i] for i in rows] for rows in of_question.values()], shown.update)
    for rows, numbers in zip(of_question.values(), found, strict=True):
        groups[rows] = numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, groups)
    os.replace(temporary, path)
    return groups


def describe(study: Study, name: str) -> dict:
    """What the page says of a model."""
    model = study.config.models[name]
    about = {
        "kind": "grpo" if model.grpo else "sft" if model.sft else "given",
        "template": study.config.template(name),
        "sampling": study.config.model_sampling(name).identity(),
        "paper": model.paper,
        "identity": study.identity(name),
    }
    if model.from_ is not None:
        return about | {"from": model.from_}
    recipe = model.grpo or model.sft
    about |= {"from": model.parent, "recipe": recipe.written()}
    return about | {"happened": {k: v for k, v in (study.result(name) or {}).items() if k != "evaluations"}}


def training_progress(study: Study, name: str) -> dict | None:
    """Accuracy with its interval over questions, and length, at each evaluation of a GRPO run (Figure 15)."""
    if not study.config.models[name].grpo or not (result := study.result(name)) or not result.get("evaluations"):
        return None
    from rlvd_jax.evaluation.intervals import Bootstrap

    rows = {"step": [], "accuracy": [], "low": [], "high": [], "length": []}
    for e in result["evaluations"]:
        rate = np.array(e["correct"]) / e["samples"]
        estimate = Bootstrap(len(rate), study.config.bootstrap, study.config.seed).mean(rate).estimate()
        for key, value in (
            ("step", e["step"]),
            ("accuracy", estimate["value"]),
            ("low", estimate["low"]),
            ("high", estimate["high"]),
            ("length", e["length"]),
        ):
            rows[key].append(value)
    return rows | {"kept": result["kept"], "problems": study.config.models[name].grpo.evaluate_on}


def self_distillation(study: Study) -> list[dict]:
    """The rows of Table 1 that this study has: for each comparison of RL with its base model, the two and what was
    distilled between them, on the problems distilled from and the first others of the comparison."""
    config, rows = study.config, []
    for c in config.comparisons:
        if c.claim != "rl":
            continue
        distilled = {}
        for name, model in config.models.items():
            sft = model.sft
            if sft and not sft.only_solved_by and {sft.student, sft.teacher} <= {c.base, c.other}:
                distilled.setdefault((sft.student, sft.teacher), name)
        for train in dict.fromkeys(config.models[name].sft.problems for name in distilled.values()):
            for test in [p for p in c.problems if p != train][:1]:
                wanted = [
                    (None, None, c.base),
                    (c.base, c.base, distilled.get((c.base, c.base))),
                    (None, None, c.other),
                    (c.other, c.other, distilled.get((c.other, c.other))),
                    (c.base, c.other, distilled.get((c.base, c.other))),
                ]
                rows += [
                    {"student": student, "teacher": teacher, "model": model, "train": train, "test": test}
                    for student, teacher, model in wanted
                    if model and {(model, train), (model, test)} <= study.analysed.keys()
                ]
    return rows


def shown(study: Study, graded: dict[str, dict[str, Graded]]) -> dict[str, list[dict]]:
    """Ten responses of each model: the first sample to questions spread evenly over the base model's difficulty."""
    config, out = study.config, {}
    for name in config.models:
        sets = [p for p, by_model in graded.items() if name in by_model]
        own_first = sorted(config.comparisons, key=lambda c: name not in (c.base, c.other))
        candidates = [(c.base, p) for c in own_first for p in c.problems if p in sets]
        base, problems = candidates[0] if candidates else (name, sets[-1] if sets else None)
        if problems is None:
            continue
        reference = graded[problems][base]
        successes, n = reference.correct.sum(axis=1), reference.valid.sum(axis=1)
        bins, names = assign(successes, n), labels(int(n.max()))
        order = np.argsort(successes, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, SHOWN).round().astype(int))]
        bin_of = {reference.questions[i]: names[bins[i]] for i in chosen}
        by_id = {p.id: p for p in study.problems(problems)}
        first = {
            r.problem_id: r
            for r in study.responses(name, problems).responses()
            if r.sample == 0 and r.problem_id in bin_of
        }
        out[name] = [
            {
                "problem": by_id[id].problem,
                "gold": by_id[id].answer,
                "text": first[id].text,
                "correct": first[id].correct,
                "answer": first[id].answer,
                "tokens": first[id].tokens,
                "stop": first[id].stop,
                "bin": bin_of[id],
            }
            for id in bin_of
            if id in first
        ]
    return out


def versions() -> dict[str, str]:
    """Of everything that a number could depend on."""
    found = {"rlvd_jax": __version__, "python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if jax := sys.modules.get("jax"):  # the report of a finished study needs no device
        devices = jax.devices()
        found["devices"] = f"{len(devices)} × {devices[0].device_kind}"
    return found
