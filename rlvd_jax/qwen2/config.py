"""The architecture of a checkpoint, as its config.json says it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rlvd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """The numbers of a `Qwen2ForCausalLM` that shape its arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @classmethod
    def from_directory(cls, directory: str | Path) -> Qwen2Config:
        """Read `config.json`; UserError if it is missing, malformed or of another architecture."""
        path = Path(directory) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{directory}: no config.json, so this is not a Hugging Face checkpoint") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}: holds no JSON object, so this is not a Hugging Face checkpoint")
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: dict, source: str = "config") -> Qwen2Config:
        """From the contents of a config.json; `source` names it in errors."""
        named = data.get("architectures") or data.get("model_type")
        architecture = named[0] if isinstance(named, list) else named
        if architecture not in ("Qwen2ForCausalLM", "qwen2"):
            raise UserError(f"{source}: architecture {architecture} is not supported, only Qwen2ForCausalLM is")
        # transformers 5 moved rope_theta into rope_parameters.
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "rope scaling": kind if kind != "default" else None,
            "hidden_act": data.get("hidden_act") if data.get("hidden_act", "silu") != "silu" else None,
            "sliding window attention": data.get("use_sliding_window") or None,
        }
        for what, value in unsupported.items():
            if value is not None:
                raise UserError(f"{source}: {what} ({value}) is not supported")
        try:
            heads, hidden = int(data["num_attention_heads"]), int(data["hidden_size"])
            config = cls(
                vocab_size=int(data["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(data["intermediate_size"]),
                num_hidden_layers=int(data["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(data.get("num_key_value_heads") or heads),
                head_dim=int(data.get("head_dim") or hidden // heads),
                rms_norm_eps=float(data.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 1e4),
                tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
                max_position_embeddings=int(data.get("max_position_embeddings", 32768)),
            )
        except KeyError as error:
            raise UserError(f"{source}: {error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: a size is not a number: {error}") from None
        except ZeroDivisionError:
            raise UserError(f"{source}: num_attention_heads is 0") from None
        for name, value in dataclasses.asdict(config).items():
            if name != "tie_word_embeddings" and not value > 0:
                raise UserError(f"{source}: {name} is {value}, but it must be positive")
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{source}: {config.num_attention_heads} query heads cannot share "
                f"{config.num_key_value_heads} key-value heads"
            )
        if config.head_dim % 2:
            raise UserError(f"{source}: head_dim is {config.head_dim}, but rotary positions need an even one")
        return config

    def to_dict(self) -> dict:
        """The same as a config.json that `transformers` reads."""
        data = dataclasses.asdict(self)
        return data | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "use_sliding_window": False,
        }

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        d, f, q = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        layer = d * q + q + 2 * (d * kv + kv) + q * d + 3 * d * f + 2 * d
        return self.num_hidden_layers * layer + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that one position of one response takes."""
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim * itemsize
