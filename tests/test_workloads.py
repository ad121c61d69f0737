"""The benchmarks' frozen lists and floors."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import workloads


def test_lists():
    """`lists` checks the digests of what it draws."""
    main = workloads.lists("W_MAIN")
    assert [len(prompt) for prompt, _ in main] == [100] * 16
    lengths = [n for _, samples in main for n in samples]
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (4096, 1_999_024, 64, 2048)
    assert workloads.lists("W_ONE") == main[:1]
    assert workloads.lists("W_FIX256") == [(main[0][0], [512] * 256)]
    assert [samples for _, samples in workloads.lists("W_FIX1K")] == [[512] * 256] * 4


def test_shapes():
    """Parameters as published, the tied table counted once."""
    assert [workloads.shape(s).parameters for s in ("0.5B", "1.5B", "3B")] == [494032768, 1543714304, 3085938688]


def test_floors():
    c = workloads.shape("1.5B")
    # Of 256 responses at 100 positions the weights' and the cache's bytes; of 4,096, the products' work.
    assert workloads.step_floor(c, 256, 100, 3e12, 7e14) == pytest.approx((2 * c.parameters + 25600 * 28672) / 3e12)
    work = 4096 * (2 * c.parameters + 4 * 12 * 128 * 28 * 100)
    assert workloads.step_floor(c, 4096, 100, 3e12, 7e14) == pytest.approx(work / 7e14)
    # Between the floors of the first step and of the last.
    first, last = (256 / workloads.step_floor(c, 256, 100 + n, 3e12, 7e14) for n in (0, 511))
    assert last < workloads.list_floor(c, workloads.lists("W_FIX256"), 1024, 3e12, 7e14) < first
    main = workloads.lists("W_MAIN")
    few, many = (workloads.list_floor(c, main, slots, 3.0e12, 729e12) for slots in (256, 1024))
    assert 100e3 < few < 120e3 < 155e3 < many < 170e3


def test_training_flops():
    c = workloads.shape("1.5B")
    assert workloads.train_flops(c, 2048) == 6 * c.parameters + 12 * 28 * 12 * 128 * 2048 // 2
