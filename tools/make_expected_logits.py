"""Makes what tests/test_model.py expects: tiny Qwen2 checkpoints as torch transformers writes them, and its logits.

    python tools/make_expected_logits.py [DIRECTORY]      # default: tests/data; needs torch

Two random models, with tied and untied embeddings, bfloat16 weights in several shards; beside each `expected.npz`:
tokens [rows, time] int32 and transformers' logits of them [rows, time, vocab], computed in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

MODELS = {
    "qwen2-tied": {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen2-untied": {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
    },
}


def random_model(sizes: dict, draw: np.random.RandomState) -> Qwen2ForCausalLM:
    """A model in float32 whose every weight, biases and norms too, is random and fits bfloat16."""
    model = Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=128, attn_implementation="eager", **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = (1.0 if "norm" in name else 0.0) + 0.25 * draw.standard_normal(tuple(weight.shape))
            weight.copy_(torch.tensor(value).bfloat16().float())
    return model


def logits(model: Qwen2ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()


def make(directory: Path) -> None:
    for seed, (name, sizes) in enumerate(MODELS.items()):
        draw = np.random.RandomState(seed)
        model = random_model(sizes, draw)
        tokens = draw.randint(0, sizes["vocab_size"], (3, 40)).astype(np.int32)
        (directory / name).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(directory / name / "expected.npz", tokens=tokens, logits=logits(model, tokens))
        model.to(torch.bfloat16).save_pretrained(directory / name, max_shard_size="20KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parents[1] / "tests" / "data")
    make(parser.parse_args().directory)
