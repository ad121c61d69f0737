"""What the paper measures of graded responses: accuracy, difficulty, diversity, style. NumPy only.

graded = Graded.from_columns(question, correct, tokens, group, texts=texts)
results = analyse({"math-500": {"base": graded, "rl": other}}, [dict(base="base", other="rl", problems="math-500")])
"""

from rlvd_jax.evaluation.analysis import analyse
from rlvd_jax.evaluation.graded import Graded

__all__ = ["Graded", "analyse"]
