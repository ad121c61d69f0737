import json

import numpy as np
import pytest

from rlvd_jax import tokenizer
from rlvd_jax.demo import world
from rlvd_jax.errors import UserError


def write(directory, vocab_size=96):
    world.write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": vocab_size}))
    return directory


def test_decode_drops_special_tokens_and_what_is_no_token(tmp_path):
    loaded = tokenizer.load(write(tmp_path))
    vocabulary = world.vocabulary()
    rng = np.random.RandomState(0)
    responses = [rng.randint(0, 96, size=rng.randint(0, 30)).astype(np.int32) for _ in range(2000)]
    plain = ["".join(vocabulary[i] for i in r if len(world.SPECIAL) <= i < len(vocabulary)) for r in responses]
    assert tokenizer.decode(loaded, responses) == plain
    assert tokenizer.decode(loaded, [r.tolist() for r in responses[:5]]) == plain[:5]
    assert tokenizer.decode(loaded, []) == []
    assert tokenizer.decode(loaded, [loaded(r"17b \boxed{05}<|im_end|>")["input_ids"]]) == [r"17b \boxed{05}"]


def test_a_tokenizer_that_does_not_match_the_model(tmp_path):
    rows = len(world.vocabulary())
    assert len(tokenizer.load(write(tmp_path, rows))) == rows
    with pytest.raises(
        UserError, match=r"does not match the model: '.' has id 87, and the model has embeddings for 87"
    ):
        tokenizer.load(write(tmp_path, rows - 1))


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer: neither tokenizer\.json nor vocab\.json with merges\.txt"):
        tokenizer.load(tmp_path)
    write(tmp_path)
    (tmp_path / "config.json").unlink()
    assert len(tokenizer.load(tmp_path)) == 88  # Nothing to check it against.
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=r"config\.json: no vocab_size"):
        tokenizer.load(tmp_path)
    write(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="its tokenizer cannot be loaded: ") as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
