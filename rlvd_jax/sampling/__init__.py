"""The jitted sampler: many responses to each prompt, decoded on the device without a host step a token."""

from rlvd_jax.sampling.sampler import Completion, Request, Sampler

__all__ = ["Completion", "Request", "Sampler"]
