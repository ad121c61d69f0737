"""Judge and report on responses from any engine: `python -m rlvd_jax.evaluate FILE…`

A file is JSON Lines or Parquet with a row for each response (or for each question, with lists of responses), or one of
our own response sets (a directory). Several files are several models, the first one the base of the comparisons:

    python -m rlvd_jax.evaluate base=vllm-base.jsonl rl=vllm-rl.parquet --claim rl --output report

Columns are known by their common names; another is named with an option, a field of objects with dots. The right
answers can come from a file of problems instead:

    python -m rlvd_jax.evaluate outputs.jsonl --response-column outputs.text --problems problems.jsonl

Needs no JAX and no accelerator.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rlvd_jax.errors import UserError, nearest
from rlvd_jax.evaluation import Graded, analyse, difficulty
from rlvd_jax.foreign import COLUMNS, MEANING, Questions, Responses, know, read_all, short
from rlvd_jax.problems import read_file as read_problems

PROBLEMS = "these problems"  # the name of the one set of problems in the results


def judge(models: dict[str, Responses], questions: Questions, unit: str, args) -> dict[str, Graded]:
    """Grade what is not graded, group equal answers, and lay everything out as matrices; lengths in tokens or words."""
    from rlvd_jax.grading import Grader

    with Grader(workers=args.workers, deadline=args.deadline) as grader:
        _grade(models, questions, grader, args.regrade)
        groups = _group(models, _same_text if args.group == "text" else grader.groups)
    return {
        model: Graded.from_columns(
            r.question,
            r.correct,
            [len(text.split()) for text in r.text] if unit == "words" else r.tokens,
            groups[model],
            texts=r.text,
            truncated=[bool(cut) for cut in r.stop],
            sample=None if None in r.sample else r.sample,
        )
        for model, r in models.items()
    }


def _grade(models: dict[str, Responses], questions: Questions, grader, regrade: bool) -> None:
    """Fill in verdicts, and the answers of all responses."""
    from rlvd_jax.grading import extract

    todo = {model: [i for i, c in enumerate(r.correct) if regrade or c is None] for model, r in models.items()}
    for model, rows in todo.items():
        r = models[model]
        if unknown := [i for i in rows if r.question[i] not in questions.gold]:
            raise UserError(
                f"{r.source}: there is no right answer to question {short(r.question[unknown[0]])} to judge its "
                "responses by: name the column with --gold-column, or a file of problems with --problems"
            )
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="grading", unit=" responses", disable=not total or None) as bar:
        for model, r in models.items():
            chunks = [todo[model][start : start + 1000] for start in range(0, len(todo[model]), 1000)]
            handles = [grader.submit([(questions.gold[r.question[i]], r.text[i]) for i in chunk]) for chunk in chunks]
            for chunk, handle in zip(chunks, handles, strict=True):
                for i, verdict in zip(chunk, handle.result(), strict=True):
                    r.correct[i], r.answer[i] = verdict.correct, verdict.answer
                bar.update(len(chunk))
            judged = set(todo[model])
            r.answer = [a if a or i in judged else extract(r.text[i]) for i, a in enumerate(r.answer)]


def _group(models: dict[str, Responses], groups) -> dict[str, np.ndarray]:
    """Of each model, the group of each response's answer among those to the same question."""
    result = {}
    total = sum(len(set(r.question)) for r in models.values())
    with tqdm(total=total, desc="comparing answers", unit=" questions", disable=None) as bar:
        for model, r in models.items():
            by_question: dict[str, list[int]] = {}
            for i, question in enumerate(r.question):
                by_question.setdefault(question, []).append(i)
            rows = list(by_question.values())
            group = result[model] = np.empty(len(r.question), np.int32)
            for start in range(0, len(rows), 50):
                part = rows[start : start + 50]
                found = groups([[r.answer[i] for i in question] for question in part])
                for question, numbers in zip(part, found, strict=True):
                    group[question] = numbers
                bar.update(len(part))
    return result


def _same_text(answers_by_question: list[list[str | None]]) -> list[list[int]]:
    groups = []
    for answers in answers_by_question:
        number = {answer: i for i, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
        groups.append([number.get(a, -1) for a in answers])
    return groups


def compare(models: dict[str, Responses], base: str, claims: list[str]) -> list[dict]:
    """The comparisons: every other model against the base, with the claims that the user wants tested of it."""
    kinds = {}
    for text in claims:
        model, _, kind = text.rpartition("=")
        if kind not in (known := ("rl", "new_knowledge", "reasoning_only")):
            raise UserError(f"--claim {text}: '{kind}' is not a kind of claim{nearest(kind, known)}")
        if model and model not in models:
            raise UserError(f"--claim {text}: '{model}' is not among the models{nearest(model, models)}")
        kinds |= dict.fromkeys([model] if model else models, kind)
    others = [model for model in models if model != base]
    for other in others:
        if not set(models[base].question) & set(models[other].question):
            raise UserError(
                f"'{base}' and '{other}' have no question in common: if their prompts differ, name what tells the "
                "questions apart with --id-column"
            )
    return [{"base": base, "other": other, "problems": PROBLEMS, "claim": kinds.get(other)} for other in others]


def remarks(models: dict[str, Responses], base: str, unit: str, regrade: bool) -> list[str]:
    """What a reader of the numbers should know about the responses."""
    notes = []
    verdicts = [c is not None for r in models.values() for c in r.correct]
    if any(verdicts) and not regrade:
        kept = f"{sum(verdicts):,} of {len(verdicts):,} responses"
        notes.append(f"The files' own verdicts on {kept} are kept; --regrade judges them anew.")
    if unit == "words":
        notes.append("Lengths are in words: not every response has a token count (--tokens-column).")
    questions = set(models[base].question)
    for model, r in models.items():
        if None in r.stop:
            some = "no response" if set(r.stop) == {None} else "not every response"
            notes.append(f"{model}: {some} says whether it was cut off (--stop-column).")
        counts = Counter(r.question)
        fewest, most = min(counts.values()), max(counts.values())
        if fewest < most:
            notes.append(f"{model} has {fewest} to {most} responses a question: its pass@k ends at k = {fewest}.")
        if counts.keys() != questions:
            notes.append(
                f"{base} has {len(questions)} questions and {model} {len(counts)}: they are compared on the "
                f"{len(questions & counts.keys())} that both have."
            )
    return notes


def pick_samples(models: dict[str, Responses], questions: Questions, graded, base: str, seed: int) -> dict:
    """Ten responses of each model, to different questions where there are as many, the hard ones first."""
    successes, n = graded[base].correct.sum(axis=1), graded[base].valid.sum(axis=1)
    names = difficulty.labels(int(n.max()))
    bins = dict(zip(graded[base].questions, difficulty.assign(successes, n).tolist(), strict=True))
    picked = {}
    for model, r in models.items():
        rows = list(range(len(r.text)))
        random.Random(seed).shuffle(rows)
        first: dict[str, int] = {}
        for i in rows:
            first.setdefault(r.question[i], i)
        repeats = [i for i in rows if first[r.question[i]] != i]
        chosen = [*first.values(), *repeats][:10]
        chosen.sort(key=lambda i: bins.get(r.question[i], len(names)))
        picked[model] = [
            {
                "problem": questions.problem.get(r.question[i], r.question[i]),
                "gold": questions.gold.get(r.question[i]),
                "text": r.text[i],
                "correct": r.correct[i],
                "answer": r.answer[i],
                "tokens": r.tokens[i],
                "stop": None if r.stop[i] is None else "length" if r.stop[i] else "end",
                "bin": names[bins[r.question[i]]] if r.question[i] in bins else None,
            }
            for i in chosen
        ]
    return picked


def _cell(e: dict, scale: float, digits: int = 1) -> str:
    if e["value"] is None:
        return "-"
    text = f"{scale * e['value']:.{digits}f}"
    return text if e["low"] is None else f"{text} [{scale * e['low']:.{digits}f}, {scale * e['high']:.{digits}f}]"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(results: dict, unit: str) -> str:
    """The numbers as text for a terminal: models, comparisons, claims."""
    found = results["problems"][PROBLEMS]
    head = ["model", "questions", "n", "accuracy %", "maj@n %", "pass@k %", "k", "entropy", unit, "cut off %"]
    rows = [head]
    for name, m in found["models"].items():
        last = {end: m["pass"][end][-1] for end in ("value", "low", "high")}
        rows.append(
            [
                name,
                str(m["questions"]),
                str(m["samples"]),
                _cell(m["accuracy"], 100),
                _cell(m["maj"], 100),
                _cell(last, 100),
                str(m["pass"]["k"][-1]),
                _cell(m["entropy"], 1, 2),
                _cell(m["length"]["all"], 1),
                "-" if m["truncated"] is None else f"{100 * m['truncated']:.1f}",
            ]
        )
    parts = [_table(rows)]
    for c in found["comparisons"].values():
        d = c["difference"]
        parts.append(
            f"{c['other']} against {c['base']} ({c['questions']} questions), in points: "
            f"accuracy {_cell(d['accuracy'], 100)}, "
            f"maj@{c['samples']} {_cell(d['maj'], 100)}, pass@{c['k']} {_cell(d['pass'], 100)}"
        )
        rows = [[f"successes of {c['base']}", "questions", f"{c['base']} %", f"{c['other']} %", "gain"]]
        for b in c["bins"]:
            rows.append([b["label"], str(b["questions"]), *(_cell(b[key], 100) for key in ("base", "other", "gain"))])
        parts.append(_table(rows))
    if results["claims"]:
        parts.append("\n".join(f"{c['verdict']}: {c['claim']} {c['evidence']}" for c in results["claims"]))
    return "\n\n".join(parts)


def versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for package in ("rlvd_jax", "numpy", "math-verify", "latex2sympy2-extended", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[package] = metadata.version(package)
    return known


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rlvd_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="JSON Lines, Parquet, or a directory of responses")
    p.add_argument("--output", metavar="DIR", help="write results.json and the page (index.html) here")
    p.add_argument(
        "--problems",
        dest="problems_file",
        metavar="FILE",
        help="JSON Lines with problem, answer and perhaps id: the right answers to the questions, found by text or id",
    )
    p.add_argument("--base", metavar="NAME", help="the model that the others are compared with (default: the first)")
    p.add_argument(
        "--claim",
        metavar="[NAME=]KIND",
        action="append",
        default=[],
        help="test the paper's claims about a model: rl, new_knowledge or reasoning_only",
    )
    p.add_argument("--regrade", action="store_true", help="judge responses that are graded already")
    p.add_argument(
        "--group",
        choices=("equal", "text"),
        default="equal",
        help="answers are the same if math-verify calls them equal (default), or by their text alone, which is faster",
    )
    p.add_argument("--workers", type=int, help="grading processes (default: one a processor core)")
    p.add_argument("--deadline", type=float, default=5.0, help="seconds to judge a response (default: 5)")
    p.add_argument(
        "--hardest", type=int, default=50, help="questions in the plot of pass@k on the hardest (default: 50)"
    )
    p.add_argument("--bootstrap", type=int, default=2000, help="resamples behind the intervals (default: 2000)")
    p.add_argument("--seed", type=int, default=0, help="of the resamples and the responses shown (default: 0)")
    for what, meaning in MEANING.items():
        p.add_argument(f"--{what}-column", metavar="COLUMN", help=f"{meaning} (looked for: {', '.join(COLUMNS[what])})")
    return p


def evaluate(args) -> dict:
    """Read, judge, analyse and show; returns the results."""
    for option, least in (("hardest", 1), ("bootstrap", 100), ("seed", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option}: is {least} at least, not {getattr(args, option)}")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output: {args.output} is a file, not a directory")
    named = {what: name for what in COLUMNS if (name := getattr(args, f"{what}_column")) is not None}
    models, questions, columns = read_all(args.files, named)
    if args.problems_file and not know(read_problems(Path(args.problems_file)), questions, models):
        asked = short(next(iter(models.values())).question[0])
        raise UserError(
            f"--problems: no question of the responses is in {args.problems_file}, by its text or its id: the first "
            f"is {asked}"
        )
    base = args.base or next(iter(models))
    if base not in models:
        raise UserError(f"--base: '{base}' is not among the models{nearest(base, models)}")
    comparisons = compare(models, base, args.claim)
    unit = "words" if any(None in r.tokens for r in models.values()) else "tokens"
    notes = remarks(models, base, unit, args.regrade)
    for path, chosen in columns.items():
        print(f"{path}: " + ", ".join(f"{what} from '{name}'" for what, name in chosen.items()))
    for note in notes:
        print(f"Note: {note}")
    graded = judge(models, questions, unit, args)
    about = {m: {"kind": "given", "from": r.source, "paper": None} for m, r in models.items()}
    results = {
        "study": "evaluation",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": dict(vars(args).items()) | {"columns": columns},
        "versions": versions(),
        "notes": notes,
        "length_unit": unit,
    } | analyse(
        {PROBLEMS: graded},
        comparisons,
        models=about,
        hardest=args.hardest,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    for model, r in models.items():
        if set(r.stop) == {None}:
            results["problems"][PROBLEMS]["models"][model]["truncated"] = None
    print("\n" + summary(results, unit))
    if args.output:
        from rlvd_jax import report

        page = report.write(results, args.output, pick_samples(models, questions, graded, base, args.seed))
        print(f"\nThe page: {page}")
    return results


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(arguments)  # files may follow options
    try:
        evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
