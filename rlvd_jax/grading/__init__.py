r"""Is a response correct? math-verify decides, in worker processes that can be killed.

    with Grader(workers=8, deadline=5.0) as grader:
        verdicts = grader.grade((problem.answer, response.text) for ...)
        groups = grader.groups([[v.answer for v in verdicts_of_a_question], ...])

The last `\boxed{...}` of a response (without one, the whole response) is parsed, and so is the gold answer, wrapped in
`\boxed{}` because math-verify reads many bare answers wrongly or not at all; the response is correct if
`verify(gold, answer)` (paper section A.12). What does not parse or takes longer than the deadline is wrong. The paper's
code calls `verify(answer, gold)`; math-verify's comparison is not symmetric and documents the gold answer as the first.

Works where no JAX is installed, and never imports it.
"""

from rlvd_jax.grading.answers import extract
from rlvd_jax.grading.grader import Grader, Verdict

__all__ = ["Grader", "Verdict", "extract"]
