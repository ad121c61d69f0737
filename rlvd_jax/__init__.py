"""Reinforcement learning with verifiable rewards against distillation, in JAX.

Data flows one way: problems → prompts → sampler → responses → grader → metrics → report. Training
consumes graded responses and gives back a checkpoint. Nothing is imported here, so that the half of
the package that needs no JAX (grading, evaluation, report) stays importable without it.
"""

__version__ = "0.1.0"
