"""Qwen2.5 in Flax: the model, its weights in Hugging Face directories, and how it lies on a mesh of devices."""

from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.model import Qwen2

__all__ = ["Qwen2", "Qwen2Config"]
