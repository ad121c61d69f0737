"""Verdicts on responses and groups of equal answers, from a pool of workers, each distinct pair judged once."""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from hashlib import blake2b
from typing import Literal, NamedTuple, Self

from rlvd_jax.errors import UserError
from rlvd_jax.grading.answers import last_box, rational
from rlvd_jax.grading.pool import Pool

_CACHED = 200_000  # verdicts kept, some 300 bytes each
_LONG = 1000  # characters; a longer answer from a response without a box is not kept
_DEATHS = 3  # of workers at one response, before it is to blame
_GROUPING = 10  # deadlines of processor time for the answers to one question


class Verdict(NamedTuple):
    """What became of one response."""

    correct: bool
    answer: str | None
    """The inside of the last box; without a box, what math-verify reads in the text; None if that is nothing."""
    reason: Literal["ok", "timeout", "crash", "unparsed"]
    """ok: compared with the gold answer. Else wrong: it took too long, three workers died at it, or math-verify
    found nothing to compare in it (or in the gold answer)."""


class Grader:
    """Judges responses with math-verify in `workers` processes, each response within `deadline` seconds.

    The deadline is processor time from the moment a worker starts on the response, so that a verdict doesn't depend on
    how busy the machine is. What passes it is wrong (`timeout`) and costs no other response anything. Reading the gold
    answer has a deadline of its own; where it fails, all responses to it are wrong at once. A worker that dies for
    another reason, or is silent for 20 deadlines of wall clock, may have been stopped from outside: the response it
    was at is tried again, and is wrong (`crash`) at the third such death. A worker's memory is bounded.

    Use it as a context manager: leaving it, also by Ctrl-C, ends the workers. Safe to use from several threads.

    Args:
      workers: processes, started as they are needed; None: one for each processor core this process may use.
      deadline: seconds.
    """

    def __init__(self, workers: int | None = None, deadline: float = 5.0):
        if (workers is not None and workers < 1) or not deadline > 0:
            raise UserError(f"a grader needs at least one worker and a deadline above 0, not {workers} and {deadline}")
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._deadline = deadline
        self._pool = Pool(workers, deadline)
        self._lock = threading.RLock()  # guards all below, and the fields of submissions and judgements
        self._cache: OrderedDict[tuple, tuple] = OrderedDict()  # key -> (correct, reason, answer of a text without box)
        self._running: dict[tuple, _Judgement] = {}
        self._hopeless: set[str] = set()  # gold answers that can't be read within the deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what is still being judged fails."""
        self._pool.close()

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        r"""The verdicts on pairs (gold answer without `\boxed{}`, response), in their order."""
        return self.submit(pairs).result()

    def submit(self, pairs: Iterable[tuple[str, str]]) -> "Future[list[Verdict]]":
        """As `grade`, without waiting: `.result()` of what this returns waits."""
        verdicts: list[Verdict | None] = []
        open_pairs = []
        for gold, text in pairs:
            inside = last_box(text)
            value = None if inside is None else rational(inside)
            right = None if value is None else rational(gold)
            if right is None:
                open_pairs.append((len(verdicts), gold, text, inside))
                verdicts.append(None)
            else:  # most answers, and no work for a worker
                verdicts.append(Verdict(value == right, inside, "ok"))
        submission = _Submission(verdicts, len(open_pairs))
        new = []
        try:
            with self._lock:
                for index, gold, text, inside in open_pairs:
                    has_box = inside is not None
                    key = (has_box, _short(gold), _short(inside if has_box else text))
                    answer = inside.strip() or None if has_box else None
                    if key in self._cache:
                        self._cache.move_to_end(key)
                        correct, reason, found = self._cache[key]
                        submission.put(index, Verdict(correct, answer if has_box else found, reason))
                        continue
                    task = self._running.get(key)
                    if task is None:
                        task = _Judgement(self, key, gold, inside if has_box else text, answer)
                        new.append(task)
                        self._running[key] = task
                    task.waiting.append((submission, index))
            if new:
                self._pool.submit(new)
        except BaseException as error:  # Ctrl-C too: nobody may wait for what was never handed over
            for task in new:
                task.fail(error)
            raise
        return submission.future

    def groups(
        self, answers_by_question: Iterable[Sequence[str | None]], progress: Callable[[], object] | None = None
    ) -> list[list[int]]:
        """Which answers to a question are equal: for each list of answers, the group of each of them.

        Groups are numbered from 0 in the order in which they first appear; no answer (None) is -1. Equal strings are
        one group; else answers are equal if math-verify's `verify` calls them equal in both orders (it isn't
        symmetric: with 1 first it equals 2x + z = 1, with 1 second it doesn't). Nor is it transitive: distinct answers
        are taken most frequent first, and each joins the first group whose most frequent member it equals.

        The answers to one question take at most 10 deadlines of processor time; those that are left then are grouped
        by equal strings alone, as are answers that can't be parsed within the deadline.

        progress: called once for each question, when it and all before it are done.
        """
        questions = [list(answers) for answers in answers_by_question]
        futures, tasks = [], []
        for answers in questions:
            distinct = [a for a, _ in Counter(a for a in answers if a is not None).most_common()]
            task = _Grouping(distinct, self._deadline)
            values = [rational(a) for a in distinct]
            if None in values:
                tasks.append(task)
            else:  # equal if their values are, which needs no worker
                task.future.set_result(values)
            futures.append((distinct, task.future))
        if tasks:
            self._pool.submit(tasks)
        result = []
        for answers, (distinct, future) in zip(questions, futures, strict=True):
            group = dict(zip(distinct, future.result(), strict=True))
            order = {g: i for i, g in enumerate(dict.fromkeys(group[a] for a in answers if a is not None))}
            result.append([-1 if a is None else order[group[a]] for a in answers])
            if progress:
                progress()
        return result

    def _finish(self, task: "_Judgement", correct: bool, reason: str, found: str | None = None) -> None:
        with self._lock:
            self._running.pop(task.key, None)
            if found is None or len(found) <= _LONG:
                self._cache[task.key] = correct, reason, found
                if len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            verdict = Verdict(correct, task.answer if task.has_box else found, reason)
            for submission, index in task.waiting:
                submission.put(index, verdict)


def _short(text: str) -> str | bytes:
    """`text`, or a hash in its place if it is long."""
    return text if len(text) <= 64 else blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Submission:
    def __init__(self, verdicts: list[Verdict | None], missing: int):
        self.future: Future[list[Verdict]] = Future()
        self.future.set_running_or_notify_cancel()  # it can't be cancelled
        self._verdicts, self._missing = verdicts, missing
        if not missing:
            self.future.set_result(verdicts)

    def put(self, index: int, verdict: Verdict) -> None:
        self._verdicts[index] = verdict
        self._missing -= 1
        if not self._missing and not self.future.done():
            self.future.set_result(self._verdicts)


class _Judgement:
    """A pool's task: one distinct pair of gold answer and response."""

    def __init__(self, grader: Grader, key: tuple, gold: str, text: str, answer: str | None):
        self.key, self.answer, self.has_box = key, answer, key[0]
        self.waiting: list[tuple[_Submission, int]] = []
        self.request = ("judge", gold, text, self.has_box)
        self.characters = len(gold) + len(text)
        self.alone = False
        self._grader, self._gold = grader, gold
        self._deaths = 0
        self._gold_read = False
        self._judged: tuple[bool, str] | None = None

    def settled(self) -> bool:
        hopeless = self._gold in self._grader._hopeless
        if hopeless:
            self._grader._finish(self, False, "timeout")
        return hopeless

    def receive(self, message: tuple, last: bool) -> None:
        kind, *values = message
        if kind == "gold":
            self._gold_read = True
        elif kind == "verdict":
            self._judged = tuple(values)
        if last:
            self._grader._finish(self, *self._judged, values[0] if kind == "answer" else None)

    def lost(self, timeout: bool) -> bool:
        self._deaths += not timeout
        if not timeout and self._deaths < _DEATHS:
            self.alone = True
            self._gold_read, self._judged = False, None
            return True
        if self._judged:  # only what a text without a box is read as is lost
            self._grader._finish(self, *self._judged)
            return False
        if timeout and not self._gold_read:
            self._grader._hopeless.add(self._gold)
        self._grader._finish(self, False, "timeout" if timeout else "crash")
        return False

    def fail(self, error: BaseException) -> None:
        with self._grader._lock:
            self._grader._running.pop(self.key, None)
            for submission, _ in self.waiting:
                if not submission.future.done():
                    submission.future.set_exception(error)


class _Grouping:
    """A pool's task: the distinct answers to one question, the most frequent first."""

    alone = False

    def __init__(self, answers: list[str], deadline: float):
        self.answers = answers
        self.characters = sum(map(len, answers))
        self.future: Future[list[int]] = Future()
        self._deadline = deadline
        self._budget = _GROUPING * deadline
        self._placed: list[int] = []
        self._spent = 0.0
        self._broken: set[int] = set()
        self._unequal: set[tuple[int, int]] = set()
        self._step = (0, -1)  # what the worker is at: (answer, group to compare with, or -1 for parsing it)
        self._deaths: Counter[tuple[int, int]] = Counter()

    @property
    def request(self) -> tuple:
        return ("group", self.answers, self._placed, self._broken, self._unequal, self._budget)

    def settled(self) -> bool:
        return False

    def receive(self, message: tuple, last: bool) -> None:
        kind, *values = message
        if kind == "try":
            *step, self._spent = values
            self._step = tuple(step)
        elif kind == "put":
            group, self._spent = values
            self._placed.append(group)
        if last:
            self.future.set_result(self._placed)

    def lost(self, timeout: bool) -> bool:
        self._budget -= self._spent + (self._deadline if timeout else 0)
        self._spent = 0.0
        self._deaths[self._step] += not timeout
        if not timeout and self._deaths[self._step] < _DEATHS:
            return True
        if self._step[1] < 0:
            self._broken.add(self._step[0])
        else:
            self._unequal.add(self._step)
        return True

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)
