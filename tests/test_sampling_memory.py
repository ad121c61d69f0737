import dataclasses

import pytest

from rlvd_jax.config import SamplingConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2Config
from rlvd_jax.sampling.memory import Demand, devices_of_model, weight_bytes

SEVEN = Qwen2Config(152064, 3584, 18944, 28, 28, 4, 128)  # Qwen2.5-7B
GIB = 2**30


def test_as_few_devices_as_hold_the_weights():
    assert weight_bytes(SEVEN, 2, 1) == 2 * SEVEN.parameters
    embedding = 2 * 152064 * 3584  # whole on each
    assert weight_bytes(SEVEN, 2, 4) == pytest.approx(embedding + (2 * SEVEN.parameters - embedding) / 4)

    def devices(memory, here, **settings):
        return devices_of_model(SEVEN, SamplingConfig(**settings), 2, memory, here)

    assert devices(None, 8) == devices(80 * GIB, 8) == 1
    assert devices(15.75 * GIB, 8) == 2
    assert devices(8 * GIB, 8) == 4
    assert devices(8 * GIB, 6) == 2  # no more of them can work together
    assert devices(80 * GIB, 8, tensor=4) == 4
    with pytest.raises(UserError, match="which does not divide the 6 devices here"):
        devices(80 * GIB, 6, tensor=4)
    with pytest.raises(UserError, match="28 query heads cannot be split over 8 devices"):
        devices(80 * GIB, 8, tensor=8)


def demand(prompt, layout="tpu", tensor=1, context=32768, **settings):
    c = dataclasses.replace(SEVEN, max_position_embeddings=context)
    return Demand(c, SamplingConfig(**settings), layout, 2, tensor, prompt)


def test_the_longest_response():
    assert demand(100).length == 4160  # 128 and 4,000, in whole pages
    assert demand(100, max_tokens=40).length == 168
    assert demand(100, max_tokens=32768).length == 32768, "a response ends with the context"
    assert demand(2100, context=3000).length == 4096, "a prompt is laid out as a power of two"


def test_what_a_response_takes_of_each_device():
    position = 28 * 2 * 4 * 128 * 2  # keys and values of 28 layers, 4 heads of 128
    assert demand(100).position == position
    assert demand(100, tensor=2).position == position / 2
    assert demand(100, tensor=7 * 4).position == position / 4, "each has one head, a copy of it if need be"
    assert demand(100, top_k=0).work == 3 * demand(100).work == 24 * 152064
    assert demand(100, top_k=1000).work == demand(100, top_k=0).work, "of so many a sort is what finds them"
    assert demand(100, "gpu", top_k=0).work == 3 * demand(100, "gpu").work == 24 * 152064


@pytest.mark.parametrize("layout", ["plain", "tpu"])
@pytest.mark.parametrize("free", [5 * GIB, 20 * GIB, 40 * GIB])
def test_a_plan_takes_what_is_free(layout, free):
    wanted = demand(100, layout)
    plan = wanted.plan(10_000, free)
    spare = wanted.position * 64 if layout == "tpu" else 16 * (wanted.length * wanted.position + wanted.work)
    assert free - spare < wanted.bytes(plan) <= free
    assert wanted.plan(5, free).slots == 16 and wanted.bytes(wanted.plan(5, free)) < free
    with pytest.raises(UserError, match="max_tokens: one response of 4160 positions needs"):
        wanted.plan(10_000, wanted.least - 1)
    assert wanted.plan(10_000, wanted.least).slots == 1


def test_numbers_of_slots():
    """Few; on GPUs up to 64, or multiples of that."""
    plans = [[demand(100, layout).plan(n, 130 * GIB).slots for n in (5, 70, 280, 10_000)] for layout in ("tpu", "gpu")]
    assert plans == [[16, 96, 288, 1024], [16, 128, 320, 4096]]
