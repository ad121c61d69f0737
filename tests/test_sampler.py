import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from test_filters import exact, p_value
from tiny_qwen2 import CONFIGS, logits, params_of, random_model

from rlvd_jax.config import SamplingConfig
from rlvd_jax.errors import UserError
from rlvd_jax.sampling import Request, Sampler, cache, decoder, gpu
from rlvd_jax.sampling import sampler as sampler_module
from rlvd_jax.sampling import slots as device
from rlvd_jax.sampling.ahead import Ahead
from rlvd_jax.sampling.books import Group, Plan
from rlvd_jax.sampling.rows import share_out, shares

ROOT = Path(__file__).parents[1]
TIED = CONFIGS["tied"]
SETTINGS = SamplingConfig(temperature=0.9, top_k=20, top_p=0.95, max_tokens=80, drafts=0)  # which tests ask for
SEED = 3
NEVER = (97, 98, 99)  # end tokens that are never drawn: the programs are those of three real ones


def make_sampler(model, end_tokens=NEVER, dtype=jnp.float32, **settings):
    sampler = Sampler(model.config, SETTINGS.model_copy(update=settings), end_tokens, dtype=dtype)
    sampler.load(params_of(model))
    return sampler


def some_requests(samples=5, count=12):
    """Prompts of 1 to 30 tokens, more of them than are prefilled at once."""
    draw = np.random.RandomState(0)
    lengths = [1, 30, 16, 17, *draw.randint(1, 30, count - 4)]
    prompts = [tuple(draw.randint(0, 60, n).tolist()) for n in lengths]
    return [Request(p, int(draw.randint(0, 2**32, dtype=np.uint64)), tuple(range(samples))) for p in prompts]


def run(sampler, requests, seed=SEED):
    """(question, sample) → completion; every one once."""
    out = {}
    for completion in sampler.sample(requests, seed):
        key = requests[completion.request].question, completion.sample
        assert key not in out
        out[key] = completion
    assert out.keys() == {(r.question, s) for r in requests for s in r.samples}
    return out


def assert_same(ours, theirs, atol=5e-5):
    """The same tokens; log-probabilities up to the rounding of matrix products of other shapes."""
    assert ours.keys() == theirs.keys()
    for key, completion in ours.items():
        np.testing.assert_array_equal(completion.tokens, theirs[key].tokens)
        np.testing.assert_allclose(completion.logprobs, theirs[key].logprobs, atol=atol, rtol=0)
        assert completion.stop == theirs[key].stop


def differing(ours, theirs):
    """Share of responses that differ."""
    return np.mean([not np.array_equal(ours[key].tokens, theirs[key].tokens) for key in ours])


@pytest.fixture(scope="module")
def model():
    return random_model(TIED)


@pytest.fixture(scope="module")
def sampler(model):
    """Slots for all of `requests` at once (64); its tests draw about as many, to share its programs."""
    return make_sampler(model)


@pytest.fixture(scope="module")
def narrow(model):
    """Slots that are refilled many times."""
    return make_sampler(model, slots=7)


@pytest.fixture(scope="module")
def requests():
    return some_requests()


@pytest.fixture(scope="module")
def whole(sampler, requests):
    """Every response to its full length."""
    return run(sampler, requests)


def forced(model, requests, completions, temperature):
    """Log-probabilities of the completions' tokens from one forward pass each of the whole model, float64."""
    by_key = {r.question: r.prompt for r in requests}
    rows = [np.append(by_key[key[0]], c.tokens) for key, c in completions.items()]
    tokens = np.zeros((len(rows), 112), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    logp = special.log_softmax(np.float64(logits(model, tokens)) / temperature, axis=-1)
    out = {}
    for row, ids, (key, c) in zip(logp, rows, completions.items(), strict=True):
        at = np.arange(len(ids) - len(c.tokens), len(ids))
        out[key] = row[at - 1, ids[at]]
    return out


# ---- distribution ------------------------------------------------------------------------------------


def test_tokens_follow_the_filtered_softmax(model):
    """The first token, drawn from the prompt's prefill, and the second, from a decode step after it: 100,000 draws."""
    sampler = make_sampler(model, (), top_k=12, top_p=0.9, max_tokens=2, slots=8192)
    prompt = (5, 41, 7, 7, 30)
    drawn = np.array([c.tokens for c in sampler.sample([Request(prompt, 9, tuple(range(100_000)))], SEED)])
    first = np.bincount(drawn[:, 0], minlength=61)
    often = np.argsort(-first)[:4]
    tokens = np.zeros((5, 8), np.int32)
    tokens[:, :5] = prompt
    tokens[1:, 5] = often
    row = logits(model, tokens)
    expected = exact(row[0, 4], 0.9, 12, 0.9)
    assert (expected > 0).sum() > 3
    assert p_value(first, expected) > 1e-4
    assert p_value(first, exact(row[0, 4], 1.0, 12, 0.9)) < 1e-4
    for token, after in zip(often, row[1:, 5], strict=True):
        second = np.bincount(drawn[drawn[:, 0] == token, 1], minlength=61)
        assert second.sum() > 1000
        assert p_value(second, exact(after, 0.9, 12, 0.9)) > 1e-4


def assert_forced(model, requests, completions, temperature):
    for key, expected in forced(model, requests, completions, temperature).items():
        np.testing.assert_allclose(completions[key].logprobs, expected, atol=1e-4, rtol=0)


def test_log_probabilities_are_those_of_the_model(model, requests, whole):
    """Of the untruncated distribution at the sampling temperature, over cache spans that grow."""
    assert_forced(model, requests, whole, 0.9)


def test_untied_embeddings(requests):
    model = random_model(CONFIGS["untied"], seed=4)
    requests = [r for r in requests if len(r.prompt) < 16]
    completions = run(make_sampler(model, temperature=1.3, top_k=0, top_p=1.0, max_tokens=24), requests)
    assert_forced(model, requests, completions, 1.3)


def test_greedy_is_the_argmax_of_the_whole_model(model, requests):
    completions = run(make_sampler(model, temperature=0), requests)
    lengths = np.array([len(r.prompt) for r in requests])
    tokens = np.zeros((len(requests), 112), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.prompt)] = request.prompt
    rows = np.arange(len(requests))
    logprobs = []
    for i in range(80):
        scores = np.float64(logits(model, tokens)[rows, lengths + i - 1])
        tokens[rows, lengths + i] = scores.argmax(axis=1)
        logprobs.append(special.log_softmax(scores, axis=1).max(axis=1))
    for (question, _), completion in completions.items():
        row = next(i for i, r in enumerate(requests) if r.question == question)
        np.testing.assert_array_equal(completion.tokens, tokens[row, lengths[row] : lengths[row] + 80])
        np.testing.assert_allclose(completion.logprobs, np.array(logprobs)[:, row], atol=1e-4, rtol=0)


def test_bfloat16(requests):
    model = random_model(TIED, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    requests = [r for r in requests if len(r.prompt) < 16]
    completions = run(make_sampler(model, dtype=jnp.bfloat16, top_p=1.0, max_tokens=24), requests)
    error = [completions[key].logprobs - row for key, row in forced(model, requests, completions, 0.9).items()]
    assert 1e-4 < np.abs(np.concatenate(error)).mean() < 0.05


# ---- the same responses, however they are drawn -------------------------------------------------------


def test_slots_do_not_matter(narrow, requests, whole):
    assert_same(run(narrow, requests), whole)


def test_order_and_company_do_not_matter(sampler, narrow, requests, whole):
    backwards = requests[::-1]
    assert_same(run(sampler, backwards), whole)
    # What a stopped run goes on with: other samples of some questions only.
    rest = [Request(r.prompt, r.question, (2,) if i % 2 else (1, 2)) for i, r in enumerate(requests[4:])]
    resumed = run(narrow, rest)
    assert_same(resumed, {key: whole[key] for key in resumed})


ON_EIGHT = """
    import pickle, sys
    import jax
    from rlvd_jax.config import MeshConfig
    from rlvd_jax.qwen2.mesh import make_mesh, shard_params
    from rlvd_jax.sampling.sampler import _Run
    from test_sampler import TIED, make_sampler, params_of, random_model, run, some_requests

    def in_step(self, moved, decode=_Run._decode):
        rounds, log = decode(self, moved)
        taken = {int(n) for r in rounds for n in r.count[(r.count > 0) & ~r.done]}
        assert len(taken) <= 1, f"some went on while others waited: {taken}"
        return rounds, log

    _Run._decode = in_step
    assert len(jax.devices()) == 8
    model = random_model(TIED)
    ends, requests = pickle.load(sys.stdin.buffer)
    sampler = make_sampler(model, ends, slots=3)
    first = run(sampler, requests)
    assert {shard.device for shard in sampler.weights["embedding"].addressable_shards} == set(jax.devices())
    sampler.load(shard_params(params_of(model), model.config, make_mesh(MeshConfig(fsdp=4, tensor=2))))
    second = run(sampler, requests[::-1])
    pickle.dump([first, second], sys.stdout.buffer)
"""


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_given_up(model, dtype):
    """They are deleted, and what is made of them is not: in the same dtype it might be the same memory."""
    sampler = Sampler(model.config, SETTINGS, NEVER, dtype=dtype)
    given = jax.tree.map(jnp.copy, params_of(model))
    sampler.load(given, give_up=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    taken = sampler.weights
    sampler.load(params_of(model))
    for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(sampler.weights), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params_of(model)))


def test_few_layers_at_a_time(model, monkeypatch):
    c = model.config
    each = 2 * c.hidden_size * c.intermediate_size * 4
    assert decoder.layers_at_once(c, 4, "layers/gate_up") == c.num_hidden_layers > 1
    expected = make_sampler(model).weights
    monkeypatch.setattr(decoder, "AT_ONCE", each)
    assert decoder.layers_at_once(c, 4, "layers/gate_up") == 1
    jax.tree.map(np.testing.assert_array_equal, make_sampler(model).weights, expected)


def test_devices_do_not_matter(model, ends):
    """Eight devices of three slots that share questions; weights from one device, and in parts from all."""
    requests = some_requests(samples=13)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", textwrap.dedent(ON_EIGHT)]
    result = subprocess.run(command, input=pickle.dumps((ends, requests)), capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    expected = run(make_sampler(model, ends, slots=7), requests)
    for completions in pickle.loads(result.stdout):
        assert_same(completions, expected)


def test_a_call_that_is_left_early(sampler, requests, whole):
    """The next one is not disturbed."""
    calls = sampler.sample(requests, SEED)
    some = [next(calls) for _ in range(2)]
    calls.close()
    for c in some:
        np.testing.assert_array_equal(c.tokens, whole[requests[c.request].question, c.sample].tokens)
    assert_same(run(sampler, requests), whole)


def test_what_does_matter(sampler, requests, whole):
    """The seed, all 64 bits of it, the question's key and the sample's number."""
    assert differing(run(sampler, requests, seed=SEED + 1), whole) > 0.9
    assert differing(run(sampler, requests, seed=SEED + (1 << 32)), whole) > 0.9
    assert differing(run(sampler, requests, seed=SEED - (1 << 63)), whole) > 0.9
    prompt = requests[5].prompt
    alike = run(sampler, [Request(prompt, key, tuple(range(20))) for key in (1, 2, 2**32 - 1)])
    assert len({c.tokens.tobytes() for c in alike.values()}) == 60
    again = run(sampler, [Request(prompt, 1, (11, 3)), Request(requests[0].prompt, 7, tuple(range(58)))])
    assert all(np.array_equal(again[1, s].tokens, alike[1, s].tokens) for s in (3, 11))


def test_new_weights(model, requests, whole):
    sampler = make_sampler(random_model(TIED, seed=9))
    assert differing(run(sampler, requests), whole) == 1
    sampler.load(params_of(model))
    assert_same(run(sampler, requests), whole)


# ---- where responses end ------------------------------------------------------------------------------


def cut(completion, ends, limit):
    """What a response is, given all its tokens, if `ends` end it and it may have `limit` tokens."""
    at = np.flatnonzero(np.isin(completion.tokens[:limit], ends))
    length = at[0] + 1 if at.size else limit
    return completion.tokens[:length], "end" if at.size else "length"


def assert_cut(completions, whole, ends, limits):
    stops = []
    for key, completion in completions.items():
        tokens, stop = cut(whole[key], ends, limits(key))
        np.testing.assert_array_equal(completion.tokens, tokens)
        np.testing.assert_allclose(completion.logprobs, whole[key].logprobs[: len(tokens)], atol=1e-5, rtol=0)
        assert completion.stop == stop
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        stops.append((stop, len(tokens), limits(key)))
    return stops


@pytest.fixture(scope="module")
def ends(whole):
    """Three tokens that are drawn at middling rates, one of them as some response's very first."""
    counts = np.bincount(np.concatenate([c.tokens for c in whole.values()]), minlength=61)
    first = min((int(c.tokens[0]) for c in whole.values()), key=lambda t: counts[t])
    return (first, *(int(t) for t in np.argsort(counts)[30:32]))


def test_end_tokens(model, requests, whole, ends):
    """Each of several ends a response, at its first place; slots are refilled as responses end."""
    stops = assert_cut(run(make_sampler(model, ends, slots=7), requests), whole, ends, lambda key: 80)
    kinds = {stop for stop, *_ in stops}
    lengths = [length for _, length, _ in stops]
    assert "end" in kinds and min(lengths) == 1 and len(set(lengths)) > 10


def test_limits(model, narrow, requests, whole, ends):
    """Of each sample, down to one token; an end token at the limit is an end."""
    limits = {}
    for r in requests:
        for s in r.samples:
            first = np.flatnonzero(np.isin(whole[r.question, s].tokens, ends))
            exactly = int(first[0]) + 1 if first.size else 80
            limits[r.question, s] = [max(1, exactly - 1), exactly, 1 + s][(s + len(r.prompt)) % 3]
    limited = [
        Request(r.prompt, r.question, r.samples, tuple(limits[r.question, s] for s in r.samples)) for r in requests
    ]
    stops = assert_cut(run(make_sampler(model, ends, slots=7), limited), whole, ends, limits.get)
    assert {(stop, length == limit) for stop, length, limit in stops} >= {("end", True), ("length", True)}
    too_many = [Request(requests[0].prompt, requests[0].question, (0,), (1000,))]
    (completion,) = run(narrow, too_many).values()
    assert len(completion.tokens) == 80


def test_the_last_responses_move_to_fewer_slots(sampler, requests, whole, monkeypatch):
    long = {(0, 1), (3, 3), (5, 0), (8, 2), (11, 4)}  # they end up alone
    limits = {(r.question, s): 70 if (i, s) in long else 4 for i, r in enumerate(requests) for s in r.samples}
    limited = [
        Request(r.prompt, r.question, r.samples, tuple(limits[r.question, s] for s in r.samples)) for r in requests
    ]
    sizes, decode = [], device.decode

    def watch(p, span, weights, layers, slots, *rest):
        sizes.append(slots.done.shape[0])
        return decode(p, span, weights, layers, slots, *rest)

    monkeypatch.setattr(device, "decode", watch)
    monkeypatch.setattr(sampler_module, "TAIL", 8)
    assert_cut(run(sampler, limited), whole, NEVER, limits.get)
    assert sizes[0] == 64
    assert sizes[-1] == 16
    sizes.clear()
    monkeypatch.setattr(Ahead, "ready", lambda self, name: name != ("decode", 16))  # still being compiled
    assert_cut(run(sampler, limited), whole, NEVER, limits.get)
    assert set(sizes) == {64}


def test_slots_that_stay_idle_for_want_of_pages_are_given_up(model, requests, whole, monkeypatch):
    """A pool that holds about a third of what the slots could: the others are computed for nothing."""
    sampler = paged(model, pages=70, slots=64)
    waiting, decode = [], sampler_module._Run._decode

    def watch(self, moved):
        waiting.append((self.slots, bool(self.queue or self.groups[0].waiting)))
        return decode(self, moved)

    monkeypatch.setattr(sampler_module._Run, "_decode", watch)
    monkeypatch.setattr(sampler_module, "PATIENCE", 3)
    assert_same(run(sampler, requests), whole)
    assert waiting[0] == (64, True)
    assert (32, True) in waiting


def test_the_context_is_a_limit(narrow):
    """Prompt and response together, and no more than max_tokens."""
    long = Request(tuple(range(50)) + tuple(range(50)), 1, (0, 1))
    longest = Request((3,) * 127, 2, (0,))
    completions = run(narrow, [longest, long])
    assert [len(completions[key].tokens) for key in ((1, 0), (1, 1), (2, 0))] == [28, 28, 1]
    assert {c.stop for c in completions.values()} == {"length"}
    for prompt in ((3,) * 128, ()):
        with pytest.raises(UserError, match=rf"prompt 1 has {len(prompt)} tokens; the model's context takes 1 to 127"):
            list(narrow.sample([long, Request(prompt, 2, (0,))], SEED))


def test_nothing_to_do(narrow):
    assert list(narrow.sample([], SEED)) == []
    assert list(narrow.sample([Request((1, 2), 3, ())], SEED)) == []
    assert len(run(narrow, [Request((1, 2) * 10, 3, ()), Request((1, 2) * 10, 4, (5,))])) == 1
    with pytest.raises(ValueError, match="load"):
        next(Sampler(TIED, SETTINGS, ()).sample([Request((1,), 1, (0,))], 0))


# ---- work that is done ---------------------------------------------------------------------------------


def test_nothing_is_compiled_twice(sampler, requests):
    compiled = []

    def count(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    run(sampler, requests)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run(sampler, requests, seed=5)
        assert compiled == []
        run(sampler, [Request(r.prompt[:-1] or r.prompt, r.question, r.samples) for r in requests])  # other lengths
        sampler.load(params_of(random_model(TIED, seed=2)))
        assert compiled == []
        jax.jit(lambda x: x * 3.25 + 1)(1.0)
        assert compiled, "the count works"
    finally:
        jax.monitoring.clear_event_listeners()
        sampler.load(params_of(random_model(TIED)))


def compilations():
    """(program, thread) of each compilation from here on, in a list that grows; the caller clears the listeners."""
    seen = []

    def note(event, duration, fun_name="", **_):
        if "backend_compile" in event:
            seen.append((fun_name, threading.current_thread().name.split("_")[0]))

    jax.monitoring.register_event_duration_secs_listener(note)
    return seen


def test_programs_are_compiled_before_they_are_needed(model, requests, whole, monkeypatch):
    """In other threads than the devices', each once: prompts of two lengths, and slots that become fewer. What is tuned
    is there before the devices begin."""
    monkeypatch.setattr(sampler_module, "AHEAD", ("interpret",))
    monkeypatch.setattr(sampler_module, "TAIL", 0)
    monkeypatch.setattr(sampler_module, "prefill_length", lambda longest, layout: 16 if longest <= 16 else 32)
    monkeypatch.setattr(Sampler, "common", lambda self, longest: max(longest, 32))
    monkeypatch.setattr(sampler_module._Run, "_tuned", lambda self, what, n: (what, n) != ("decode", 25))
    asked, before = [], []

    class Watched(Ahead):
        def begin(self, programs):
            asked.append([name for name in programs if name not in self._asked])
            super().begin(programs)

        def finish(self, names):
            before.append(names)
            super().finish(names)

    monkeypatch.setattr(sampler_module, "Ahead", Watched)
    sampler = paged(model, slots=25)  # a number that no other test has a program for
    assert len(requests[0].prompt) < 16 < len(requests[1].prompt)
    seen = compilations()
    try:
        run(sampler, [dataclasses.replace(requests[0], samples=tuple(range(30)))])
        ours = run(sampler, requests[:6])
    finally:
        jax.monitoring.clear_event_listeners()
    assert_same(ours, {key: whole[key] for key in ours})
    programs = [("prefill", 16), ("decode", 16), ("prefill", 32), ("decode", 25)]
    assert [names for names in asked if names] == [programs]
    assert before == [programs[:3], [("prefill", 32), ("prefill", 16), ("decode", 16)]]
    ahead = [name for name, thread in seen if thread == "compiler"]
    tuned = [name for name, _ in seen][: [thread for _, thread in seen].index("sampler")]
    assert sorted(set(tuned)) == ["jit(decode)", "jit(empty)", "jit(insert)", "jit(prefill)"]
    assert sorted(ahead) == ["jit(decode)"] * 2 + ["jit(insert)"] * 2 + ["jit(prefill)"] * 2
    assert not {name for name, thread in seen if thread != "compiler"} & set(ahead)


def test_what_is_tuned(sampler, monkeypatch):
    """Prefills, and of the steps that a library multiplies in one of those with as many rows."""
    config = dataclasses.replace(sampler.config, hidden_size=1536, intermediate_size=8960)
    run = SimpleNamespace(p=sampler.program._replace(config=config, layout="gpu"), drafts=63)
    run.sizes = sampler_module.sizes(256, "gpu", drafts=63)
    for name in ("_guessed", "_rows"):
        setattr(run, name, functools.partial(getattr(sampler_module._Run, name), run))
    for hopper, expected in ((True, [64]), (False, [256, 128, 64])):
        monkeypatch.setattr(gpu.hopper, "here", lambda hopper=hopper: hopper)
        assert [n for n in run.sizes if sampler_module._Run._tuned(run, "decode", n)] == expected
        assert sampler_module._Run._tuned(run, "prefill", 128)
    assert run.sizes == [256, 128, 64, 16]
    assert sampler_module.sizes(256, "gpu") == [256, 128, 64, 32, 16]
    run.p = run.p._replace(layout="tpu")
    assert not sampler_module._Run._tuned(run, "prefill", 128)


def test_what_is_compiled_ahead(monkeypatch):
    """One program after the other is lowered, while those lowered are compiled; one at a time, of two cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made = []

    class Program:
        def __init__(self, name):
            self.name, self.begun, self.go_on = name, threading.Event(), threading.Event()

        def compile(self):
            self.begun.set()
            assert self.go_on.wait(60)
            made.append(self.name)
            return 1 // (self.name != "wrong")

    first, wrong, third = (Program(name) for name in ("first", "wrong", "third"))
    lowering, at_last = threading.Event(), threading.Event()

    def last():
        lowering.set()
        assert at_last.wait(60)
        raise KeyError("no such primitive")

    ahead = Ahead({"two": lambda: [first, wrong], "third": lambda: [third], "last": last, "never": lambda: 1 // 0})
    assert first.begun.wait(60) and lowering.wait(60)
    ready = [name for name in ("two", "third", "last", "never", "of no one's") if ahead.ready(name)]
    assert ready == ["of no one's"]
    ahead.wait("never")  # has not begun: the caller does it
    ahead.wait("of no one's")
    assert made == []
    for event in (first.go_on, wrong.go_on, at_last):
        event.set()
    with pytest.raises(ZeroDivisionError):
        ahead.wait("two")
    assert third.begun.wait(60) and not ahead.ready("third")
    assert ahead._lowering["last"].exception(60) and ahead.ready("last") and ahead.ready("two")
    with pytest.raises(KeyError, match="primitive"):
        ahead.wait("last")
    third.go_on.set()
    ahead.wait("third")
    assert made == ["first", "wrong", "third"]
    ahead = Ahead({"third": lambda: [third], "first": lambda: [first, wrong], "never": lambda: 1 // 0})
    ahead.finish(["first", "never", "of no one's"])
    assert made[3:] == ["third", "first", "wrong"]
    for name in ("first", "never"):
        with pytest.raises(ZeroDivisionError):
            ahead.wait(name)

    for event in (first.begun, first.go_on, lowering, at_last):
        event.clear()
    programs = {"first": lambda: [first], "third": lambda: [third], "last": last, "never": lambda: 1 // 0}
    left = Ahead(programs)
    assert first.begun.wait(60) and lowering.wait(60)
    left.close()
    assert [name for name in programs if left.ready(name)] == []
    for event in (first.go_on, at_last):
        event.set()
    left.wait("first")
    left.wait("never")
    assert made[6:] == ["first"]
    with pytest.raises(KeyError):
        left.wait("last")
    left.begin(programs)  # what was not begun is asked for again, and nothing else
    left.finish(programs)
    assert made[7:] == ["third"]
    with pytest.raises(ZeroDivisionError):
        left.wait("never")


def test_a_prompt_is_prefilled_once(sampler, narrow, requests, monkeypatch):
    calls = []
    prefill = device.prefill
    monkeypatch.setattr(device, "prefill", lambda *a: (calls.append(a), prefill(*a))[1])
    run(narrow, [Request(requests[1].prompt, 1, tuple(range(30)))])
    assert len(calls) == 1, "30 samples through 7 slots"
    calls.clear()
    run(sampler, some_requests(samples=4, count=16))
    assert len(calls) == 16 / sampler_module.PREFILL


def test_slots_that_fit_in_memory():
    """A few numbers of slots where there is room, about as many as asked for, and a sentence where none fits."""
    config = dataclasses.replace(TIED, max_position_embeddings=512)
    # A prompt of up to 128 and 80 tokens, in whole 64s.
    each = 256 * TIED.cache_bytes(4) + 6 * 4 * TIED.vocab_size

    def plan(responses, slots=None, room=None, devices=1, layout="plain", prompt=128):
        settings = SETTINGS.model_copy(update={"slots": slots})
        sampler = Sampler(config, settings, (), layout=layout)
        stats = None if room is None else {"bytes_limit": (room * each + 1000) / 0.92, "bytes_in_use": 990}
        sampler.devices = [SimpleNamespace(memory_stats=lambda: stats)] * devices
        sampler.mesh = SimpleNamespace(shape={"data": devices})
        return sampler.plan(prompt, responses)

    assert plan(5000).slots == 1024
    assert [plan(n).slots for n in (33, 100, 280)] == [64, 128, 288]
    assert plan(100, devices=8).slots == 16
    assert plan(100, slots=50).slots == 50
    assert plan(3, slots=50).slots == 16
    assert plan(5000, room=40.5).slots == 32
    assert plan(5000, room=9.5).slots == 9
    assert plan(10, room=40.5).slots == 16
    with pytest.raises(UserError, match=r"max_tokens: one response of 256 positions needs .* lower max_tokens"):
        plan(10, room=0.5)

    # Pages: room for every slot's longest response where there is memory, and never more than memory has.
    most = plan(5000, layout="interpret")
    assert (most.slots, most.length) == (1024, 256)
    assert most.pages == 1024 * 256 // 8 + sampler_module.PREFILL * 128 // 8
    tight = plan(5000, room=40.5, layout="interpret")
    assert tight.slots > 16
    used = tight.pages * 8 * TIED.cache_bytes(4) + tight.slots * 6 * 4 * TIED.vocab_size
    prefilled = sampler_module.PREFILL * 128 * TIED.cache_bytes(4)
    assert 0.8 * 40.5 * each < used + prefilled <= 40.5 * each + 10
    with pytest.raises(UserError, match="lower max_tokens"):
        plan(10, room=2.5, layout="interpret")
    # Short prompts have the programs of longer ones, unless memory is too short for that.
    assert plan(5000, prompt=9, layout="interpret") == most
    config = dataclasses.replace(config, max_position_embeddings=4096)
    assert plan(10, prompt=9, room=7, layout="interpret").length == 128
    assert plan(10, prompt=9, room=300, layout="interpret").length == 1152  # 1,024 and 80, in whole 64s


# ---- pages, and the kernels that read them ---------------------------------------------------------------


def paged(model, pages=None, **settings):
    """A sampler whose cache is pages of 8 positions, read by the GPU's kernels step by step."""
    sampler = Sampler(model.config, SETTINGS.model_copy(update=settings), NEVER, layout="interpret")
    sampler.load(params_of(model))
    if pages:
        plan = sampler.plan
        sampler.plan = lambda *wanted: dataclasses.replace(plan(*wanted), pages=pages)
    return sampler


def test_pages_make_no_difference(model, requests, whole):
    """Prompts that share pages, end within one or at its edge; slots that are refilled, and that become fewer."""
    ours = run(paged(model, slots=7), requests[6::-1])
    assert_same(ours, {key: whole[key] for key in ours})


def test_products_of_more_rows_with_pages(model, requests, whole, monkeypatch):
    """As many slots as there are here have a kernel of their own; this is what more have."""
    taken, product = [], gpu.product
    monkeypatch.setattr(gpu, "FEW", 0)
    monkeypatch.setattr(gpu, "product", lambda *a, **how: taken.append(how["by"]) or product(*a, **how))
    requests = requests[3:9]
    ours = run(paged(model, slots=11), requests)  # a number that no other test has a program for
    assert_same(ours, {key: whole[key] for key in ours})
    assert set(taken) == {"library"}


def test_slots_that_are_done_are_left_out(model, requests, whole, monkeypatch):
    """Of many slots those that are done come last in a step, and what kernels leave there is nobody's."""
    monkeypatch.setattr(device, "PACKED", 9)
    monkeypatch.setattr(gpu, "FEW", 0)

    def of_used(find, h, w, used, **how):
        out = find(h, w, used, **how)
        return jnp.where((jnp.arange(len(h)) < used)[:, None], out, jnp.nan)

    def spoilt(logits, *rest, draw=device.draw):
        return draw(jnp.where(jnp.isnan(logits).any(), jnp.nan, logits), *rest)

    for name in ("product", "gated"):
        monkeypatch.setattr(gpu, name, functools.partial(of_used, getattr(gpu, name)))
    monkeypatch.setattr(device, "draw", spoilt)
    ours = run(paged(model, slots=9), requests)
    assert_same(ours, whole)


def test_live_slots_come_first():
    live = jnp.array([False, True, True, False, False, True])
    order, place = device._live_first(live)
    assert order.tolist() == [1, 2, 5, 0, 3, 4]
    assert order[place].tolist() == list(range(6))


def test_groups_share_the_last_responses_evenly(monkeypatch):
    """56 requests of 10 for two groups with more slots than that takes, prompts prefilled eight at a time; then more
    requests than there are slots."""
    for slots, expected in ((320, [280, 280]), (160, [160, 160])):
        plan = Plan(slots, 128, 0)
        run = object.__new__(sampler_module._Run)
        run.s, run.p = SimpleNamespace(layout="plain", weights=None), None
        run.groups = [Group(plan, 128, 1), Group(plan, 128, 1)]
        run.requests = [Request((1, 2), i, tuple(range(10))) for i in range(56)]
        run.queue, run.ahead = deque((i, range(10)) for i in range(56)), Ahead({})
        monkeypatch.setattr(run, "_put", lambda x: x)
        monkeypatch.setattr(device, "prefill", lambda *_: None)
        while run._prefill_next():
            for g in run.groups:
                assert len(g.waiting) <= 8
                for request, samples in g.waiting:
                    g.occupant[np.flatnonzero(~g.live)[:10]] = [(request, i) for i in samples]
                g.waiting.clear()
        assert [int(g.live.sum()) for g in run.groups] == expected


def test_steps_of_a_round_of_several_groups(sampler):
    run = object.__new__(sampler_module._Run)
    run.p, run.slots, run.pace, run.drafts = sampler.program._replace(layout="gpu"), 512, 0.0, 1
    run.groups = [Group(Plan(512, 128, 0), 128, 1) for _ in range(2)]
    for g, live in zip(run.groups, (512, 500), strict=True):
        g.occupant[:live] = 0
    assert run._in_step(128, [16, 40]) == 128, "nothing is known yet"
    run.pace = 0.25  # 22 are wanted of each: 16 of one, 28 of the other
    assert run._in_step(128, [16, 40]) == 88
    assert run._in_step(64, [16, 40]) == 64
    run.pace = 10.0
    assert run._in_step(128, [16, 40]) == 4, "as many as are taken without a look"
    run.slots = 32
    assert run._in_step(64, [32, 32]) == 8
    assert run._in_step(5, [32, 32]) == 5, "no more than pages are there for"


@pytest.mark.parametrize("layout", ["gpu", "interpret"])
def test_steps_taken_together_end_where_pages_do(sampler, layout):
    """Past the last step that pages are there for, none may be taken."""
    together = [device.together(sampler.program._replace(layout=layout), n) for n in (1, 16, 256, 512, 1024, 4096)]
    assert together == [8, 8, 8, 4, 2, 1]
    assert all(device.LOG % n == device.TURNS % n == 0 and cache.page_size(layout) % n == 0 for n in together)
    assert device.together(sampler.program._replace(layout="plain"), 16) == 1, "a host that is the device looks at once"


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_pool_that_runs_dry(model, requests, whole, drafts):
    """The youngest are given up and begun again, to the same result; all pages come back."""
    requests = requests[3:9]
    whole = {key: whole[key] for key in whole if key[0] in {r.question for r in requests}}
    sampler = paged(model, pages=40, slots=16, drafts=drafts)
    groups = []
    refill = sampler_module._Run._refill

    def watch(self):
        groups[:] = self.groups
        for g in self.groups:  # every page is free, a prompt's, or in one slot only
            own = [p for s, n in enumerate(g.held) for p in g.table[s, :n] if g.live[s]]
            shared = [p for x in g.shared.values() for p in x.pages]
            assert sorted([*g.pool.free, *shared, *set(own).difference(shared)]) == list(range(40))
        refill(self)

    def guessed(*args, decode=device.decode_drafts):
        *out, gain = decode(*args)
        assert gain[0, 0] < int(args[-1]) + 8, "steps, of 8 together, when no slot may take one more"
        return *out, gain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module._Run, "_refill", watch)
        patch.setattr(device, "decode_drafts", guessed)
        assert_same(run(sampler, requests), whole)
    assert sampler.counts["given_up"] > 5
    assert groups[0].pool.left == 40


def test_drafts_make_no_difference(model, requests, whole, monkeypatch):
    """Guesses that are mostly wrong, slots that are refilled and become fewer, end tokens and limits."""
    monkeypatch.setattr(sampler_module, "LEAST_GAIN", 0)
    monkeypatch.setattr(device, "decode", None)  # all steps are with drafts
    ours = run(paged(model, slots=7, drafts=3), requests[6:0:-1])
    assert_same(ours, {key: whole[key] for key in ours})
    monkeypatch.undo()
    draw = np.random.RandomState(1)
    limited = [dataclasses.replace(r, limits=tuple(draw.randint(1, 40, len(r.samples)).tolist())) for r in requests[:4]]
    ends = (3, 5, 7)
    expected = run(make_sampler(model, ends), limited)
    assert {c.stop for c in expected.values()} == {"end", "length"}
    monkeypatch.setattr(sampler_module, "LEAST_GAIN", 0)
    sampler = Sampler(model.config, SETTINGS.model_copy(update={"slots": 5, "drafts": 2}), ends, layout="interpret")
    sampler.load(params_of(model))
    assert_same(run(sampler, limited), expected)


def test_what_is_guessed():
    """What followed where most was like the end, or the last of several."""
    texts = {
        (1, 2, 3, 4, 5, 2, 3, 6, 7, 1, 2, 3): (4, 5, 2),  # three alike, though two came later
        (9, 2, 3, 4, 5, 2, 3, 6, 7, 1, 2, 3): (6, 7, 1),
        (8, 3, 4, 5, 3): (4, 5, 3),
        (0, 1, 2, 5, 3, 4, 9, 9, 6, 3, 8, 0, 1, 2, 6, 3): (4, 9, 9),  # four alike, not in a row, though two came later
        (0, 2, 8, 3, 5, 6, 1, 2, 7, 3, 9, 1, 2, 8, 3): (5, 6, 1),  # three in a row, where later three are not
        (8, 1, 2, 1, 2): (1, 2, 1),  # goes on as it did
        (5, 5, 5, 5): (5, 5, 5),
        (1, 2, 3, 4): (1, 2, 3),  # nothing is alike
    }
    seen, position = np.full((len(texts), 16), -1, np.int32), np.zeros(len(texts), np.int32)
    for i, text in enumerate(texts):
        seen[i, : len(text)], position[i] = text, len(text) - 1
    slot, nth = np.divmod(np.arange(3 * len(texts)), 3)
    guesses = device._look_up(jnp.asarray(seen), jnp.asarray(position), slot, nth)
    np.testing.assert_array_equal(guesses.reshape(-1, 3), list(texts.values()))


@pytest.fixture(scope="module")
def repeating():
    """A model that repeats itself: without what its layers add, a token is likeliest to follow itself."""
    model = random_model(TIED)
    for weight in (model.layers.o, model.layers.down):
        weight.set_value(jnp.zeros_like(weight.get_value()))
    return model


def test_drafts_save_steps(repeating, requests):
    model, requests = repeating, [dataclasses.replace(r, samples=(0, 1)) for r in requests[:6]]
    how = {"slots": 12, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    alone = paged(model, **how)
    expected = run(alone, requests)
    assert max(len(set(c.tokens.tolist())) for c in expected.values()) > 1
    sampler = paged(model, **how, drafts=3)
    assert_same(run(sampler, requests), expected)
    assert sampler.counts["steps"] < 0.5 * alone.counts["steps"]


def test_no_guess_counts_after_the_end(repeating):
    """Where the text says that an end token comes again and again, and the first draw is one."""
    ends, how = (5, 9), {"slots": 12, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    requests = [Request((1, *[token] * 6), token, (0, 1, 2, 3)) for token in ends]
    expected = run(make_sampler(repeating, ends, **how), requests)
    assert sum(len(c.tokens) == 1 for c in expected.values()) > 2
    settings = SETTINGS.model_copy(update={**how, "drafts": 3})
    sampler = Sampler(repeating.config, settings, ends, layout="interpret")
    sampler.load(params_of(repeating))
    assert_same(run(sampler, requests), expected)


def test_drafts_know_the_text(model, requests, whole, monkeypatch):
    """What was drawn before the last responses moved to few slots, some of it in slots that others had before; of fewer
    slots more is fetched at once."""
    monkeypatch.setattr(device, "TURNS", 8)
    monkeypatch.setattr(sampler_module, "TAIL", 0)
    monkeypatch.setattr(sampler_module, "LEAST_GAIN", 0)
    known, taken, call = [], [], device.decode_drafts

    def watch(p, drafts, weights, layers, slots, seen, *rest):
        known.append((np.asarray(slots.position), np.asarray(slots.done), np.asarray(seen)))
        *out, gain = call(p, drafts, weights, layers, slots, seen, *rest)
        taken.append((int(gain[0, 0]), len(out[-1])))
        return *out, gain

    monkeypatch.setattr(device, "decode_drafts", watch)
    requests = requests[:4]
    draws = [(r.question, sample) for r in requests for sample in r.samples]
    limits = {draw: 8 + 110 // (2 + i) for i, draw in enumerate(reversed(draws))}  # fewer and fewer go on
    requests = [dataclasses.replace(r, limits=tuple(limits[r.question, s] for s in r.samples)) for r in requests]
    ours = run(paged(model, slots=19, drafts=63), requests)
    expected = {
        key: dataclasses.replace(c, tokens=c.tokens[: limits[key]], logprobs=c.logprobs[: limits[key]])
        for key, c in whole.items()
        if key in limits
    }
    assert_same(ours, expected)
    assert {len(seen) for *_, seen in known} == {19, 16}
    assert {n for _, n in taken} == {4 * 8 * 64 // 19, 4 * 8 * 64 // 16} and max(n for n, _ in taken) == 8
    texts = {(*r.prompt, *whole[r.question, s].tokens.tolist()) for r in requests for s in r.samples}
    position, done, seen = next(x for x in known if len(x[-1]) == 16)
    assert (~done).sum() > 2 and position[~done].max() > 20
    for at, text in zip(position[~done], seen[~done].tolist(), strict=True):
        assert any(whole_text[: at + 1] == tuple(text[: at + 1]) for whole_text in texts)
        assert set(text[at + 1 :]) == {-1}


def test_rows_are_shared():
    """By those that are live, as many for each, give or take one, up to what each has room for."""
    live, room = np.array([True, False, True, True, True]), np.array([9, 9, 9, 1, 9])
    assert shares(live, jnp.asarray(room), 14).tolist() == [4, 0, 4, 1, 3]
    assert shares(~live, jnp.asarray(room), 14).tolist() == [0, 9, 0, 0, 0]
    assert shares(live & False, jnp.asarray(room), 14).tolist() == [0] * 5
    rows = share_out(jnp.array([4, 0, 4, 1, 3]), 14, 16)
    assert rows.slot[rows.there].tolist() == [0] * 4 + [2] * 4 + [3] + [4] * 3
    assert rows.nth[rows.there].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2]
    assert rows.tile[:4].tolist() == [[0, 4], [4, 4], [8, 1], [9, 3]] and set(rows.tile[4:, 1].tolist()) == {0}
    for slots in (1, 7, 16, 64):  # there are programs for all rows, however many slots are live
        find = jax.jit(lambda live: share_out(shares(live, 64, 64), 64, 6))
        for number in range(1, slots + 1):
            found = find(jnp.arange(slots) < number)
            assert found.there.all() and found.tile[:, 1].sum() == 64, (slots, number)


def test_drafts_that_never_hold_are_given_up(model, requests, whole, monkeypatch):
    monkeypatch.setattr(device, "TURNS", 8)
    monkeypatch.setattr(sampler_module, "TRIED", 100)
    taken = []
    for name in ("decode", "decode_drafts"):
        call = getattr(device, name)
        monkeypatch.setattr(device, name, lambda *a, name=name, call=call: taken.append(name) or call(*a))
    requests = requests[2:4]
    ours = run(paged(model, slots=10, drafts=1), requests)
    assert_same(ours, {key: whole[key] for key in ours})
    assert taken[:2] == ["decode_drafts"] * 2, "80 steps of slots are not enough to judge by"
    assert set(taken[2:]) == {"decode"}


ON_FOUR = """
    import pickle, sys
    import jax
    from test_sampler import (
        CONFIGS, SETTINGS, Sampler, assert_same, compilations, params_of, random_model, run, sampler_module
    )

    def split(name, layout, tensor, devices=None):
        model = random_model(CONFIGS[name])
        settings = SETTINGS.model_copy(update={"tensor": tensor, "slots": 8, "max_tokens": 30, "drafts": 3})
        sampler = Sampler(model.config, settings, (), layout=layout, devices=devices)
        sampler.load(params_of(model))
        down = sampler.weights["layers"][0]["down"]
        inputs = 1 if layout == "interpret" else 0  # the axis of them
        assert down.addressable_shards[0].data.shape[inputs] == down.shape[inputs] // tensor
        return run(sampler, requests)

    requests = pickle.load(sys.stdin.buffer)
    sampler_module.AHEAD, sampler_module.LEAST_GAIN, seen = ("interpret",), 0, compilations()
    for name, splits in (("tied", [("interpret", 1), ("interpret", 2), ("plain", 4)]), ("untied", [("plain", 2)])):
        whole = split(name, "plain", 1, jax.devices()[:1])
        for layout, tensor in splits:
            seen.clear()
            assert_same(split(name, layout, tensor), whole)
            by = "compiler" if layout == "interpret" else "sampler"
            decode = "jit(decode_drafts)" if (layout, tensor) == ("interpret", 1) else "jit(decode)"
            for program in ("jit(prefill)", "jit(insert)", decode):
                assert {thread for what, thread in seen if what == program} == {by}, program
"""


def test_weights_split_over_devices(requests):
    """Four devices, two groups of two, and one of four draw what one device does: with guesses, with more devices than
    key-value heads, and with a vocabulary that can be split and one that cannot."""
    few = [Request(r.prompt, r.question, r.samples[:2]) for r in requests]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", textwrap.dedent(ON_FOUR)]
    result = subprocess.run(command, input=pickle.dumps(few), capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode()


def test_what_cannot_be_split():
    for tensor, message in ((3, "divide the 1 devices"), (2, "divide the 1 devices")):
        with pytest.raises(UserError, match=message):
            Sampler(TIED, SETTINGS.model_copy(update={"tensor": tensor}), ())
    for size, message in ((3, "query heads cannot be split over 3"), (8, "cannot be split over 8 devices")):
        with pytest.raises(UserError, match=message):
            decoder.check_split(TIED, size)
