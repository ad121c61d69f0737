"""How long do all metrics of a large study take, intervals included, and how much memory?

    python tools/bench_evaluation.py                # a base model and RL: 7,500 questions x 256 responses of each
    python tools/bench_evaluation.py --questions 500 --models 1 --json

Made-up graded responses: each question has a rate of success, which is higher under the other models, and wrong answers
whose frequencies follow Zipf's law. They are laid out as matrices and analysed as a study is (`evaluation.analyse`),
every model compared with the first. Grading, comparing answers and counting phrases, which a study does once for each
response and keeps, are not part of it.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlvd_jax.evaluation import Graded, analyse


def made_up(questions: int, samples: int, power: float, seed: int) -> dict:
    """The columns of a model's responses, as `Graded.from_columns` takes them. power: 1 is the base model, less is
    better."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(0.4, 0.6, questions)[:, None] ** power
    correct = rng.random((questions, samples)) < rate
    wrong = np.minimum(rng.zipf(1.5, correct.shape), samples - 1)
    number = np.where(correct, 0, wrong).astype(np.int32)
    number[rng.random(number.shape) < 0.02] = -1  # no answer
    tokens = rng.integers(50, 4000, correct.shape)
    phrases = rng.poisson(1.5, correct.shape)
    return {
        "question": [f"q{i}" for i in range(questions) for _ in range(samples)],
        "correct": (correct & (number == 0)).ravel(),
        "tokens": tokens.ravel(),
        "group": number.ravel(),
        "keywords": phrases.ravel(),
        "keywords_substring": phrases.ravel(),
        "truncated": (tokens > 3900).ravel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=7500)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--bootstrap", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    names = ["base", *(f"rl-{i}" for i in range(1, args.models))]
    columns = [made_up(args.questions, args.samples, 0.6 ** (i > 0), i) for i in range(args.models)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, processor = time.perf_counter(), time.process_time()
    graded = {name: Graded.from_columns(**c) for name, c in zip(names, columns, strict=True)}
    laid_out = time.perf_counter() - began
    comparisons = [{"base": "base", "other": other, "problems": "test", "claim": "rl"} for other in names[1:]]
    found = analyse({"test": graded}, comparisons, bootstrap=args.bootstrap)
    r = {
        "questions": args.questions,
        "samples": args.samples,
        "models": args.models,
        "bootstrap": args.bootstrap,
        "claims": len(found["claims"]),
        "layout_seconds": laid_out,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "made_up_gib": before / 2**20,
        "load": os.getloadavg()[0],
    }
    if args.json:
        print(json.dumps(r))
        return
    print(
        f"{r['questions']:,} questions x {r['samples']} responses of {r['models']} models, "
        f"{r['bootstrap']:,} resamples, {r['claims']} claims\n"
        f"  {r['seconds']:.1f} s (laid out in {r['layout_seconds']:.1f} s), {r['processor_seconds']:.1f} s of "
        f"processor time\n  peak {r['peak_gib']:.2f} GiB, of it the input {r['made_up_gib']:.2f}; load {r['load']:.1f}"
    )


if __name__ == "__main__":
    main()
