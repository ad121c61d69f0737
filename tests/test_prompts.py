import hashlib
import json
import re
from pathlib import Path

import pytest
import tokenizers
import transformers

from rlvd_jax import prompts
from rlvd_jax.demo import world
from rlvd_jax.errors import UserError
from rlvd_jax.problems import Problem

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    world.write_tokenizer(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def byte_tokenizer(*added, **special):
    """Every byte a token, `added` ones after them (256, 257, ...), and a beginning of text that encoding would add."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*added, "<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_the_three_templates():
    question = "What is $1+1$?"
    assert prompts.render("question", question) == question
    assert prompts.render("qwen-math", question) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    )
    r1 = prompts.render("r1", question)
    assert r1.startswith(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves"
    )
    assert r1.endswith("answer is enclosed within <answer> </answer> tags. User: What is $1+1$? Assistant: <think>")


@pytest.mark.skipif(not (SHARED / "paper.txt").exists(), reason="needs ../shared")
def test_templates_are_the_papers_words():
    """The paper prints them without line breaks, and `<|im start|>` for `<|im_start|>`."""
    paper = (SHARED / "paper.txt").read_text(encoding="utf-8")
    r1 = re.search(r"Template 1 \(R1 template\) (.*? Assistant: <think>)", paper)[1]
    assert prompts.TEMPLATES["r1"] == r1
    qwen = re.search(r"Template 2 \(Qwen-Math template\) (.*?) Template 3", paper)[1]
    ours = prompts.TEMPLATES["qwen-math"].replace("im_", "im ")
    assert ours.split() == re.sub(r" (<\|im end)", r"\1", qwen).split()


def test_only_the_placeholder_is_replaced():
    question = r"Let {x} = \frac{1}{2}, {question} and {0} %s $& \1"
    assert prompts.render("question", question) == question
    assert prompts.render("Q {a} {{: {question}\nA:", question) == "Q {a} {{: " + question + "\nA:"
    assert prompts.render("{question} or {question}?", "a") == "a or a?"


def test_unknown_template():
    with pytest.raises(UserError, match=r"'qwen_math' is neither a template .*did you mean 'qwen-math'"):
        prompts.render("qwen_math", "x")


def test_question_key_is_the_beginning_of_sha256():
    assert prompts.question_key("demo/train/17bTa") == int.from_bytes(
        bytes.fromhex(hashlib.sha256(b"demo/train/17bTa").hexdigest()[:8]), "little"
    )
    # Fixed for good: every stored response set hangs on it.
    assert prompts.question_key("") == 0x42C4B0E3
    keys = {prompts.question_key(f"train/algebra/{i}.json") for i in range(7500)}
    assert len(keys) == 7500 and all(0 <= k < 2**32 for k in keys)


def test_tokenize_parses_special_tokens_and_adds_none(demo):
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    problem = Problem("p/1", "1+1 é", "2")
    (ids,) = prompts.tokenize(tokenizer, "qwen-math", [problem], longest=1000)
    assert ids[0] == 256 and ids.count(256) == 3 and ids.count(257) == 2 and 258 not in ids
    assert tokenizer.decode(ids) == prompts.render("qwen-math", problem.problem)
    problems = world.problems("test", 40, 0)
    encoded = prompts.tokenize(demo, "question", problems, longest=5)
    assert [demo.decode(ids) for ids in encoded] == [p.problem for p in problems]
    assert {len(ids) for ids in encoded} == {2, 3, 4, 5}
    assert prompts.tokenize(demo, "question", [], longest=5) == []


def test_a_prompt_that_does_not_fit_names_its_problem(demo):
    problems = [Problem("p/1", "17b", "1"), Problem("p/2", "17bTaB", "1")]
    with pytest.raises(UserError, match=r"problem 'p/2' has 5 tokens and at most 4 fit"):
        prompts.tokenize(demo, "question", problems, longest=4)
    with pytest.raises(UserError, match="problem 'p/3' has no tokens"):
        prompts.tokenize(demo, "question", [Problem("p/3", "?!", "1")], longest=4)


def test_stop_tokens_are_the_union_of_all_that_end_a_response(tmp_path):
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_end|>", "<end>", "</answer>", eos_token="<end>")
    assert prompts.stop_token_ids(tokenizer, tmp_path, "question") == (256, 257, 258)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert prompts.stop_token_ids(tokenizer, tmp_path, "question") == (7, 256, 257, 258)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 9]}')
    assert prompts.stop_token_ids(tokenizer, tmp_path, "qwen-math") == (7, 9, 256, 257, 258)
    assert prompts.stop_token_ids(tokenizer, tmp_path, "r1") == (7, 9, 256, 257, 258, 259)
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert prompts.stop_token_ids(byte_tokenizer(), tmp_path, "r1") == (9, 257)


def test_stop_tokens_of_the_demo(demo, tmp_path):
    assert prompts.stop_token_ids(demo, tmp_path, "question") == (0, 2)


def test_no_stop_token_or_a_broken_config(tmp_path):
    with pytest.raises(UserError, match="neither the configuration nor the tokenizer"):
        prompts.stop_token_ids(byte_tokenizer(), tmp_path, "r1")
    for broken in ('{"eos', json.dumps([1])):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(UserError, match=r"generation_config\.json: cannot be read as a JSON object"):
            prompts.stop_token_ids(byte_tokenizer(), tmp_path, "r1")
