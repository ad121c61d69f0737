"""The sampler's host against devices that are made up."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[1] / "tools" / "simulate_sampler.py"


@pytest.mark.parametrize("how", [[], ["--real"]])
def test_two_devices(how):
    few = ["--devices", "2", "--responses", "320", "--samples", "10", "--mean", "100", "--max-tokens", "150"]
    out = subprocess.run([sys.executable, TOOL, *few, *how], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = re.fullmatch(
        r"v6e × 2: ([\d,]+) tokens in [\d.]+ s, [\d,]+ tokens/s, [\d,]+ on each; the devices work ([\d.]+)% .*\n",
        out.stdout,
    )
    lengths = [
        min(max(int(np.random.default_rng([question, sample]).lognormal(np.log(100) - 0.18, 0.6)), 30), 150)
        for question in range(32)
        for sample in range(10)
    ]
    assert found[1] == f"{sum(lengths):,}"
    assert 50 < float(found[2]) <= 100
