"""What the sampler takes of a device's memory: how many devices share a model, how many slots and pages each has.

Arithmetic alone, so that it holds for devices that are not here, too.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

from rlvd_jax.config import SamplingConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.sampling import cache, decoder, gpu, tpu_draw
from rlvd_jax.sampling.books import Plan

PREFILL = 8  # prompts that a device prefills at once
MAX_SLOTS = {"plain": 1024, "tpu": 1024, "gpu": 4096, "interpret": 1024}
SHORT = {"tpu": 256, "gpu": 512, "interpret": 256}  # positions of a short response
SHARE = 0.92  # of a device's memory, which the sampler fills at most
WEIGHTS_SHARE = 0.6  # of a device's memory that weights may take before they are split over several


def bucket(n: int, least: int = 16, factor: int = 2) -> int:
    """The smallest of least, least * factor, least * factor², … that is at least n: bounds how many shapes are
    compiled."""
    while least < n:
        least *= factor
    return least


def prefill_length(longest: int, layout: cache.Layout) -> int:
    """Tokens that prompts of up to `longest` are padded to. Where compiling takes long there are few such lengths."""
    return bucket(longest) if layout == "plain" else bucket(longest, max(128, cache.page_size(layout)), 4)


def slots_for(responses: int, layout: cache.Layout) -> int:
    """Slots for so many responses: few numbers, as programs are compiled for each; on GPUs none that their kernels for
    few rows and for many leave out."""
    each = 64 if layout == "gpu" else 32
    return bucket(responses) if responses <= 64 else -(-responses // each) * each


def weight_bytes(c: Qwen2Config, itemsize: int, tensor: int) -> float:
    """Of the decoder's weights on each of `tensor` devices that share them (`decoder.specs`): the embedding is whole
    on each. Key-value heads and a vocabulary that cannot be split are left out of account."""
    embedding = c.vocab_size * c.hidden_size
    return itemsize * (embedding + (c.parameters - embedding) / tensor)


def devices_of_model(c: Qwen2Config, settings: SamplingConfig, itemsize: int, memory: float | None, here: int) -> int:
    """How many devices share a model, of those that are here: what the settings say, else as few as hold the weights
    and leave room for responses. memory: bytes of each, None if unknown; UserError if the model cannot be split so."""
    tensor = settings.tensor or 1
    if settings.tensor is None and memory:
        while weight_bytes(c, itemsize, tensor) > WEIGHTS_SHARE * memory and here % (2 * tensor) == 0:
            tensor *= 2
    if here % tensor:
        raise UserError(f"sampling.tensor is {tensor}, which does not divide the {here} devices here")
    decoder.check_split(c, tensor)
    return tensor


@dataclasses.dataclass(frozen=True)
class Demand:
    """What sampling takes of each device, weights aside, in bytes."""

    config: Qwen2Config
    settings: SamplingConfig
    layout: cache.Layout
    itemsize: int
    tensor: int
    """Devices that share a model."""
    longest_prompt: int

    @cached_property
    def length(self) -> int:
        """Positions that the longest response takes, its prompt included."""
        prompt = bucket(self.longest_prompt)
        length = max(prompt, min(prompt + self.settings.max_tokens, self.config.max_position_embeddings))
        return -(-length // 64) * 64 if self.settings.max_tokens > 64 else length

    @property
    def position(self) -> float:
        """Keys and values of one position."""
        heads = decoder.kv_heads(self.config, self.tensor) / self.config.num_key_value_heads
        return cache.position_bytes(self.config, self.layout, self.itemsize) * heads / self.tensor

    @property
    def work(self) -> int:
        """A slot's logits in float32, and what the filters make of them: without top-k, or with a large k, they sort
        the vocabulary. Else the compiler says that the GPU's and TPU's kernels need little more than one copy."""
        s, vocab = self.settings, self.config.vocab_size
        few = {"gpu": gpu.draws(s.top_k, s.top_p), "tpu": tpu_draw.takes(vocab, s.top_k)}
        copies = 2 if few.get(self.layout) else 6
        return copies * 4 * vocab

    @property
    def prompts(self) -> float:
        """Keys and values of a prefill, before they are copied into pages."""
        if self.layout == "plain":
            return 0
        return PREFILL * prefill_length(self.longest_prompt, self.layout) * self.position

    @property
    def least(self) -> float:
        """One response to its end. Of pages it takes as many again for the prompts of the responses in flight."""
        responses = 1 if self.layout == "plain" else 2
        return responses * self.length * self.position + self.work + self.prompts

    def plan(self, responses: int, free: float) -> Plan:
        """Slots and pages of a device, or of a group that shares a model, which has so many responses to draw, and so
        many bytes free on each device; UserError where they hold no response."""
        if free < self.least:
            raise UserError(
                f"sampling.max_tokens: one response of {self.length} positions needs {self.least / 2**30:.1f} GiB, "
                f"but only {free / 2**30:.1f} GiB of device memory are free; lower max_tokens"
            )
        length, position, paged = self.length, self.position, self.layout != "plain"
        most = self.settings.slots or MAX_SLOTS[self.layout]
        slots = min(slots_for(responses, self.layout), most)
        free -= self.prompts
        # With pages, a slot is worth having where there is room for a short response; the pool does the rest.
        each = (min(length, SHORT[self.layout]) if paged else length) * position + self.work
        room = free - 2 * length * position if paged else free
        if room < slots * each:
            slots = max(1, int(room // each))
            slots = slots if slots < 16 else slots // 16 * 16
        if not paged:
            return Plan(slots, length, 0)
        size = cache.page_size(self.layout)
        pages = -(-length // size) * slots + -(-bucket(self.longest_prompt) // size) * PREFILL
        return Plan(slots, length, int(min(pages, (free - slots * self.work) / (size * position))))

    def bytes(self, plan: Plan) -> float:
        """What a plan takes."""
        size = cache.page_size(self.layout) if plan.pages else plan.length
        return (plan.pages or plan.slots) * size * self.position + plan.slots * self.work + self.prompts
