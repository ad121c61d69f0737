r"""How much faster is the grader than a plain loop over math-verify, with the same verdicts?

    python tools/bench_grading.py --problems math500.jsonl          # 256 made-up responses to each of 2 x 16 problems
    python tools/bench_grading.py --file responses.jsonl --json     # real ones: a `gold` and a `response` a line

In two rounds (halves of a file): in the first the workers are just starting, in the second they run, as in a study
after its first minutes.

The loop is `verify(parse(gold), parse(answer))` for each response in turn, with math-verify's own time limits. Made-up
responses are the problem's published solution after a sentence of another one, with the right answer in its box or one
of about 35 wrong ones (slips of a digit in it and in answers that look like it, a few of other problems; their
frequencies follow Zipf's law). A share of them has no box.
"""

import argparse
import json
import logging
import math
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import math_verify

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlvd_jax.errors import UserError
from rlvd_jax.grading import Grader, extract


def read(path: str, fields: tuple[str, ...]) -> list[dict]:
    rows = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not all(isinstance(row.get(f), str) for f in fields):
                    raise UserError(f"{path}, line {number}: needs the fields {' and '.join(fields)}")
                rows.append(row)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return rows


def slip(answer: str, draw: random.Random) -> str:
    """`answer` with one digit changed, or with a sign if it has no digit."""
    digits = [i for i, c in enumerate(answer) if c in "0123456789"]
    if not digits:
        return "-" + answer
    i = draw.choice(digits)
    return answer[:i] + draw.choice("123456789") + answer[i + 1 :]


def kind(answer: str) -> str:
    """What an answer looks like: its text with every number replaced."""
    return re.sub(r"[0-9]+", "0", answer)


def made_up(problems: list[dict], questions: int, samples: int, without_box: float, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    problems = [p for p in problems if rf"\boxed{{{p['answer']}}}" in p["solution"]]
    pairs = []
    for problem in draw.sample(problems, questions):
        gold, box = problem["answer"], rf"\boxed{{{problem['answer']}}}"
        alike = [p["answer"] for p in problems if kind(p["answer"]) == kind(gold)]
        wrong = [slip(draw.choice(alike) if draw.random() < 0.5 else gold, draw) for _ in range(30)]
        wrong += [p["answer"] for p in draw.sample(problems, 5)]
        wrong = [a for a in dict.fromkeys(wrong) if a != gold]
        weights = [1 / (rank + 1) for rank in range(len(wrong))]  # Zipf's law
        right = draw.betavariate(0.6, 0.6)
        for _ in range(samples):
            answer = gold if draw.random() < right else draw.choices(wrong, weights)[0]
            opening = re.sub(r"\\(boxed|fbox)", "", draw.choice(problems)["solution"].split(". ")[0])
            ending = answer if draw.random() < without_box else rf"\boxed{{{answer}}}"
            pairs.append((gold, f"{opening} ({draw.random():.6f}). {problem['solution'].replace(box, ending)}"))
    return pairs


def loop(pairs: list[tuple[str, str]]) -> list[bool]:
    verdicts = []
    for gold, text in pairs:
        inside = extract(text)
        answer = text if inside is None else rf"\boxed{{{inside}}}"
        verdicts.append(math_verify.verify(math_verify.parse(rf"\boxed{{{gold}}}"), math_verify.parse(answer)))
    return verdicts


def measure(pairs: list[tuple[str, str]], grader: Grader) -> dict:
    """Time the grader, then the loop; seconds of wall clock."""
    began = time.perf_counter()
    verdicts = grader.grade(pairs)
    grader_seconds = time.perf_counter() - began
    answers = {}
    for (gold, _), verdict in zip(pairs, verdicts, strict=True):
        answers.setdefault(gold, []).append(verdict.answer)
    began = time.perf_counter()
    groups = grader.groups(answers.values())
    groups_seconds = time.perf_counter() - began
    began = time.perf_counter()
    expected = loop(pairs)
    loop_seconds = time.perf_counter() - began
    entropies = []
    for ids in groups:
        counts = [n for g, n in Counter(ids).items() if g >= 0]
        entropies.append(-sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts))
    return {
        "responses": len(pairs),
        "gold_answers": len(answers),
        "distinct_pairs": len({(g, extract(t) or t) for g, t in pairs}),
        "without_box": sum(extract(t) is None for _, t in pairs),
        "entropy": sum(entropies) / len(entropies),
        "correct": sum(expected),
        "reasons": dict(Counter(v.reason for v in verdicts)),
        "loop_seconds": loop_seconds,
        "grader_seconds": grader_seconds,
        "groups_seconds": groups_seconds,
        "ratio": loop_seconds / grader_seconds,
        "different": [i for i, (v, e) in enumerate(zip(verdicts, expected, strict=True)) if v.correct != e],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", help="JSON Lines with gold and response")
    source.add_argument("--problems", help="JSON Lines with answer and solution, to make responses from")
    parser.add_argument("--questions", type=int, default=16, help="of --problems, in each of two rounds")
    parser.add_argument("--samples", type=int, default=256, help="responses to each of them")
    parser.add_argument("--without-box", type=float, default=0.03, help="share of the responses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--deadline", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a round")
    args = parser.parse_args()
    if args.file:
        pairs = [(r["gold"], r["response"]) for r in read(args.file, ("gold", "response"))]
        rounds = [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]
    else:
        problems = read(args.problems, ("answer", "solution"))
        rounds = [
            made_up(problems, args.questions, args.samples, args.without_box, 2 * args.seed + round) for round in (0, 1)
        ]
    logging.disable(logging.CRITICAL)
    with Grader(args.workers, args.deadline) as grader:
        for pairs, start in zip(rounds, ("its workers start", "its workers run"), strict=False):
            r = measure(pairs, grader)
            if args.json:
                print(json.dumps(r))
                continue
            print(
                f"{r['responses']} responses to {r['gold_answers']} gold answers: {r['distinct_pairs']} distinct "
                f"pairs, {r['without_box']} without a box, {r['correct']} correct, entropy {r['entropy']:.2f} nats\n"
                f"  plain loop {r['loop_seconds']:.2f} s, grader {r['grader_seconds']:.2f} s ({start}): "
                f"{r['ratio']:.1f} times as fast; groups {r['groups_seconds']:.2f} s\n"
                + (f"  DIFFERENT verdicts at {r['different'][:10]}" if r["different"] else "  the same verdicts")
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
