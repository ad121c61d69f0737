"""What the benchmarks run: frozen lists of prompts and lengths, the shapes of Qwen2.5, and the floors of physics.

  W_MAIN    16 prompts of 100 tokens × 256 samples, lognormal lengths (mean 488, 64 to 2,048)
  W_ONE     the first prompt of W_MAIN × 256 samples, with its lengths there
  W_FIX256  one prompt × 256 samples of 512 tokens
  W_FIX1K   four prompts × 256 samples of 512 tokens

NumPy's legacy generator never changes its streams, so every machine draws the same lists; `lists` checks it.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np

from rlvd_jax.qwen2 import Qwen2Config

TEXT_TOKENS = 151643  # ids below are ordinary text
NAMES = ("W_MAIN", "W_ONE", "W_FIX256", "W_FIX1K")


def shape(name: str, context: int = 4096) -> Qwen2Config:
    """The architecture of Qwen2.5 0.5B, 1.5B or 3B (tied embeddings)."""
    hidden, layers, heads, head_dim, mlp = {
        "0.5B": (896, 24, 14, 64, 4864),
        "1.5B": (1536, 28, 12, 128, 8960),
        "3B": (2048, 36, 16, 128, 11008),
    }[name]
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=context,
    )


def lists(name: str) -> list[tuple[tuple[int, ...], list[int]]]:
    """[(prompt, tokens of each of its samples)]."""
    z = np.random.RandomState(0).standard_normal(4096)
    lengths = np.clip(np.rint(np.exp(np.log(500.0) - 0.18 + 0.6 * z)), 64, 2048).astype("<i8")
    prompts = np.random.RandomState(1).randint(0, TEXT_TOKENS, size=(16, 100)).astype("<i8")
    digests = [hashlib.sha256(x.tobytes()).hexdigest()[:16] for x in (lengths, prompts)]
    assert digests == ["d6e0961b6b8fbb66", "c6d2c86f081fd372"], f"other lists were drawn here: {digests}"
    if name == "W_FIX256":
        lengths, prompts = np.full(256, 512), prompts[:1]
    elif name == "W_FIX1K":
        lengths, prompts = np.full(1024, 512), prompts[:4]
    elif name == "W_ONE":
        lengths, prompts = lengths[:256], prompts[:1]
    elif name != "W_MAIN":
        raise ValueError(f"no such list: {name}")
    return [(tuple(p.tolist()), lengths[256 * i : 256 * i + 256].tolist()) for i, p in enumerate(prompts)]


def step_floor(c: Qwen2Config, batch: float, context: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds that a decode step of `batch` responses at `context` positions each cannot beat, in bfloat16: every
    parameter and every live key and value read once; 2 FLOPs a parameter a token and attention's 4 · heads · head_dim
    FLOPs a token, layer and position."""
    read = 2 * c.parameters + batch * context * c.cache_bytes(2)
    attention = 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * context
    return max(read / bytes_per_s, batch * (2 * c.parameters + attention) / flops_per_s)


def list_floor(c: Qwen2Config, requests, slots: int, bytes_per_s: float, flops_per_s: float) -> float:
    """Tokens a second that a list cannot beat with `slots` responses in flight, refilled at once: the floor of every
    step, with the responses and positions that are live in it."""
    lengths = np.array([n for _, samples in requests for n in samples])
    left, position = np.zeros((2, min(slots, len(lengths))), int)
    begun, seconds = 0, 0.0
    while True:
        free = np.flatnonzero(left <= 0)[: len(lengths) - begun]
        left[free], position[free] = lengths[begun : begun + len(free)], len(requests[0][0])
        begun += len(free)
        live = left > 0
        if not live.any():
            return lengths.sum() / seconds
        seconds += step_floor(c, live.sum(), position[live].mean(), bytes_per_s, flops_per_s)
        left[live] -= 1
        position[live] += 1


def train_flops(c: Qwen2Config, tokens: int) -> int:
    """FLOPs a token of an update on rows of `tokens`: 6 for each parameter (the tied table once, as the output
    projection) and attention's 12 · layers · heads · head_dim · tokens, halved since it is causal. Recomputation is not
    counted."""
    return 6 * c.parameters + 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens


def chip() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; FLOPs a second of a bfloat16 matrix product), measured here."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"

    def best(f, x, repeat):
        f = jax.jit(f)
        jax.block_until_ready(f(x))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            y = x
            for _ in range(repeat):
                y = f(y)
            jax.block_until_ready(y)
            times.append((time.perf_counter() - start) / repeat)
        return min(times)

    size = 2**24 if on_cpu else 2**30
    copied = 2 * 4 * size / best(lambda x: x + 1, jnp.zeros(size, jnp.float32), 4)
    n = 1024 if on_cpu else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = 2 * n**3 / best(lambda x: (x @ a) * jnp.bfloat16(n**-0.5), a, 8)
    return copied, product
