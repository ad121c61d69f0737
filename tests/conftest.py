"""Fixtures of several test files. JAX is imported only by the tests that use them."""

import importlib.util
import os

import pytest

if importlib.util.find_spec(
    "libtpu"
):  # it is here to compile with; left alone JAX would look for a TPU in every process
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not os.path.exists("/dev/nvidiactl"):  # programs of a CPU, which run once or twice: compiled with less care, sooner
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture(scope="session", params=["tied", "untied"])
def tiny_config(request):
    from tiny_qwen2 import CONFIGS

    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A random model in float32."""
    from tiny_qwen2 import random_model

    return random_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """Its checkpoint directory, in several shards; not to be changed."""
    from tiny_qwen2 import params_of

    from rlvd_jax.qwen2 import weights

    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    weights.save(params_of(tiny_model), tiny_model.config, directory, shard_bytes=40_000)
    return directory
