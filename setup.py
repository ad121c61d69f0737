from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (ROOT / "rlvd_jax/__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="rlvd_jax",
    version=VERSION,
    description="Reinforcement learning against distillation: accuracy and capability of Qwen2.5 models, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rlvd_jax", "rlvd_jax.*"]), "rlvd_jax.configs"],
    package_dir={"rlvd_jax.configs": "configs"},
    package_data={
        "rlvd_jax": ["demo/*/*"],
        "rlvd_jax.report": ["*.html", "*.css", "*.js"],
        "rlvd_jax.configs": ["*.yaml"],
    },
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<1.0",
        "grain>=0.2.18,<0.3",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "huggingface-hub>=1.0",
        "math-verify>=0.9,<0.10",
        "latex2sympy2-extended>=1.11,<1.12",
        "tensorboard>=2.20",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pyarrow>=18",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "jax[tpu]",
        ],  # libtpu compiles for TPUs anywhere
    },
    entry_points={
        "console_scripts": ["rlvd-run=rlvd_jax.run:main", "rlvd-evaluate=rlvd_jax.evaluate:main"],
    },
)
