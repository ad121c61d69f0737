"""The demo's two models: the script that makes them, and that the shipped ones are what the demo needs."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from flax import nnx

from rlvd_jax import problems, prompts, tokenizer
from rlvd_jax.config import ProblemsConfig, SamplingConfig
from rlvd_jax.demo import world
from rlvd_jax.grading import extract
from rlvd_jax.qwen2 import Qwen2Config, weights
from rlvd_jax.sampling import Request, Sampler

ROOT = Path(__file__).parents[1]
SHIPPED = {name: ROOT / "rlvd_jax" / "demo" / name for name in ("base", "teacher")}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_demo_model", ROOT / "tools" / "make_demo_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def respond(directory, asked, samples, **settings):
    """(correct, text) of each response to the problems asked, both [problems, samples]."""
    model, tokens = weights.load(directory), tokenizer.load(directory)
    ends = prompts.stop_token_ids(tokens, directory, "question")
    sampler = Sampler(model.config, SamplingConfig(max_tokens=40, **settings), ends)
    sampler.load(nnx.split(model, nnx.Param)[1])
    requests = [
        Request(prompt, prompts.question_key(problem.id), tuple(range(samples)))
        for prompt, problem in zip(prompts.tokenize(tokens, "question", asked, 64), asked, strict=True)
    ]
    done = list(sampler.sample(requests, seed=0))
    texts = np.empty((len(asked), samples), object)
    for completion, text in zip(done, tokenizer.decode(tokens, [c.tokens for c in done]), strict=True):
        texts[completion.request, completion.sample] = text
    correct = [[extract(text) == problem.answer for text in row] for row, problem in zip(texts, asked, strict=True)]
    return np.array(correct), texts


def demo_problems(split, count):
    return problems.load(ProblemsConfig(demo=split, limit=count))


def bins(correct):
    """Questions by their successes out of 256: [0] [1–4] [5–16] [17–64] [65–128] [129–256]."""
    return np.histogram(correct.sum(axis=1), [0, 1, 5, 17, 65, 129, 257])[0]


def loads_with_transformers(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    assert type(config) is transformers.Qwen2Config
    assert Qwen2Config.from_dict(config.to_dict()) == Qwen2Config.from_directory(directory)
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    vocabulary = world.vocabulary()
    assert [loaded.decode([i]) for i in range(len(vocabulary))] == vocabulary
    assert config.eos_token_id == loaded.eos_token_id == vocabulary.index("<|endoftext|>")
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == generation.pad_token_id == loaded.pad_token_id == config.eos_token_id


def test_packed_rows_hold_the_corpus(script, tmp_path):
    world.write_tokenizer(tmp_path)
    tokens = tokenizer.load(tmp_path)
    batches = script.packed(world.base_corpus, np.random.RandomState(5), tokens, rows=7)
    found = []
    for _, batch in zip(range(30), batches, strict=False):
        for row, segments, learn, positions in zip(
            *(batch[k] for k in ("tokens", "segments", "learn", "positions")), strict=True
        ):
            assert (learn[segments == 0] == 0).all() and (segments > 0).sum() > script.ROW - 40
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                assert (np.diff(at) == 1).all() and (positions[at] == np.arange(len(at))).all()
                prompt, response = row[at[learn[at] == 0]], row[at[learn[at] == 1]]
                assert response[-1] == tokens.eos_token_id
                found.append((tokens.decode(prompt), tokens.decode(response[:-1])))
    # All of the corpus, in its order, nothing twice.
    corpus = world.base_corpus(np.random.RandomState(5), 8192)
    assert len(found) > 600 and found == [next(corpus) for _ in found]


def test_script_on_a_smaller_setting(script, tmp_path, capsys):
    script.main(f"--only base --out {tmp_path} --steps 50 --rows 8 --hidden 32 --layers 1".split())
    first, last = capsys.readouterr().out.split("loss ")[1].split(" nats")[0].split(" → ")
    # The uniform distribution over the 88 tokens has 4.5 nats, that over the tokens that may follow less than 3.6.
    assert float(first) > 4 and float(last) < 3.6
    assert not (tmp_path / "teacher").exists()
    directory = tmp_path / "base"
    loads_with_transformers(directory)
    model = weights.load(directory)
    assert model.config == script.architecture(32, 1)
    leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
    assert sum(leaf.size for leaf in leaves) == model.config.parameters
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_directory(script, name):
    directory = SHIPPED[name]
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 1_000_000
    loads_with_transformers(directory)
    assert Qwen2Config.from_directory(directory) == script.architecture(96, 3)


def test_shipped_tokenizer_is_the_world_s(tmp_path):
    world.write_tokenizer(tmp_path)
    for directory in SHIPPED.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((directory / name).read_text()) == json.loads((tmp_path / name).read_text())


@pytest.fixture(scope="module")
def base_responses():
    """On 64 test and 64 training problems, 256 samples each."""
    asked = demo_problems("test", 64) + demo_problems("train", 64)
    return asked, *respond(SHIPPED["base"], asked, 256)


def test_base_model_s_success_counts_fill_all_six_bins(base_responses):
    _, correct, _ = base_responses
    for split in (correct[:64], correct[64:]):
        assert 0.17 < split.mean() < 0.3
        assert 0.8 < split.any(axis=1).mean() < 0.95
        assert bins(split).min() >= 3


def test_base_model_has_both_patterns_and_thinks_again(base_responses):
    asked, correct, texts = base_responses
    worked = np.array([[not text.startswith("\\boxed") for text in row] for row in texts])
    waits = np.array([[text.count("wait") for text in row] for row in texts])
    several = np.array([problem.level > 1 for problem in asked])
    assert 0.45 < worked.mean() < 0.55
    # A problem of several operators is solved by working it out.
    assert correct[several][worked[several]].mean() > 10 * correct[several][~worked[several]].mean()
    assert 0.05 < waits[correct].mean() < waits[~correct].mean() < 0.5


def test_teacher_knows_what_the_base_model_believes_wrongly():
    known = world.knowledge()
    asked, believed = [], []
    for operator in np.flatnonzero(known.right == 0):
        for value in range(world.VALUES):
            text, truth = f"{value:02d}{world.OPERATORS[operator]}", world.facts()[operator, value]
            asked.append(problems.Problem(id=text, problem=text, answer=f"{truth:02d}"))
            believed.append(f"{known.wrong[operator, value, 0]:02d}")
    assert len(asked) == 100
    correct, texts = respond(SHIPPED["base"], asked, 1, temperature=0)
    assert correct.sum() == 0
    assert np.mean([extract(text) == belief for text, belief in zip(texts[:, 0], believed, strict=True)]) > 0.97
    composed = demo_problems("test", 64)
    correct, texts = respond(SHIPPED["teacher"], asked + composed, 1, temperature=0)
    assert correct.mean() > 0.97
    assert texts[100:, 0].tolist() == [problem.solution for problem in composed]


def test_teacher_is_right_nearly_always():
    correct, _ = respond(SHIPPED["teacher"], demo_problems("test", 64), 16)
    assert correct.mean() > 0.95 and correct.any(axis=1).all()
