"""The sampler's host against made-up devices: how long do devices wait, for it and for one another?

    python tools/simulate_sampler.py --chip v6e --devices 8 --responses 65536 [--real]

Runs what `Sampler.sample` runs, with the programs of the devices replaced: they draw nothing, end each response at a
lognormal length, and take the time that CHIPS has for a step of the 1.5B. Time is reckoned, with `--visit` seconds for
each visit of the host; with `--real` it passes, and the host takes as long as it does here. Prints tokens a second, and
of the devices' time the share in which they work, on average.
"""

from __future__ import annotations

import argparse
import os
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np

# Seconds of a step: fixed, for each slot, for each position of all responses; layout of the cache; most slots.
CHIPS = {
    "h200": (1.4e-3, 3.55e-6, 8.4e-9, "gpu", 4096),  # measured, roughly
    "v6e": (1e-3, 4.9e-6, 18.6e-9, "tpu", 1024),  # by the compiler's cycles (tpu_cycles.py)
}


class Devices:
    """What stands in for slots.py."""

    def __init__(self, args, log: int):
        self.args, self.log = args, log
        self.fixed, self.each_slot, self.each_position, *_ = CHIPS[args.chip]
        self.now = self.busy = self.free = 0.0

    def length(self, question: int, sample: int) -> int:
        """Lognormal, as those of workloads.py, of `--mean` tokens but for the ends."""
        draw = np.random.default_rng([question, sample])
        return int(np.clip(draw.lognormal(np.log(self.args.mean) - 0.18, 0.6), 30, self.args.max_tokens))

    def state(self, left, produced, done):
        wait = Waits if self.args.real else lambda x, _: x
        return SimpleNamespace(
            left=left, done_now=done, done=wait(done, self), drawn=produced, produced=wait(produced, self)
        )

    def empty(self, p, slots, room):
        n = slots * self.args.devices
        return [None], self.state(np.zeros(n, int), np.zeros(n, int), np.ones(n, bool))

    def start(self, p, s, rows, seed):
        left, produced, done = s.left.copy(), s.drawn.copy(), s.done_now.copy()
        for d, of_device in enumerate(np.asarray(rows).reshape(self.args.devices, -1, 6)):
            slots = len(done) // self.args.devices
            for slot, _, _, limit, question, sample in of_device[of_device[:, 0] < slots]:
                at = d * slots + slot
                left[at], produced[at], done[at] = min(limit, self.length(question, sample)), 0, False
        return self.state(left, produced, done)

    def take(self, p, s, rows, idle):
        rows, devices = np.asarray(rows).reshape(self.args.devices, -1), self.args.devices
        at = (rows + np.arange(devices)[:, None] * (len(s.left) // devices)).ravel()
        return self.state(s.left[at], s.drawn[at], s.done_now[at] | np.asarray(idle))

    def stop(self, p, s, which):
        return self.state(s.left, s.drawn, s.done_now | np.asarray(which))

    def decode(self, p, span, weights, layers, s, table, ends, wake, steps):
        produced, done, times = s.drawn.copy(), s.done_now.copy(), []
        shape = self.args.devices, -1
        for new, ended, of, enough in zip(
            produced.reshape(shape), done.reshape(shape), s.left.reshape(shape), np.asarray(wake), strict=True
        ):
            live = ~ended
            left = np.sort((of - new)[live])
            until = enough - ended.sum()  # so many have to end
            taken = min(int(steps), left[until - 1] if 0 < until <= len(left) else int(steps))
            positions = new[live].sum() + live.sum() * (self.args.prompt + taken / 2)
            times.append(taken * (self.fixed + ended.size * self.each_slot + positions * self.each_position))
            new[live] += np.minimum(taken, (of - new)[live])
            ended |= new >= of
        self.spend(max(times), np.mean(times))
        log = np.ones((self.log, done.size), np.int32)
        return layers, self.state(s.left, produced, done), log, log.astype(np.float32)

    def spend(self, longest: float, mean: float) -> None:
        self.busy += mean
        self.now += longest + self.args.visit
        if self.args.real:
            self.free = max(self.free, time.perf_counter()) + longest


class Waits:
    """An array that is there when the devices are done."""

    def __init__(self, value, devices: Devices):
        self.value, self.devices = value, devices

    def __array__(self, dtype=None, copy=None):
        time.sleep(max(0.0, self.devices.free - time.perf_counter()))
        return self.value.copy()


def simulate(args) -> tuple[int, float, float]:
    """(tokens, seconds, of these the share in which devices work)"""
    import jax.numpy as jnp
    import workloads

    from rlvd_jax.config import SamplingConfig
    from rlvd_jax.sampling import Request, Sampler, cache, sampler, slots
    from rlvd_jax.sampling.books import Plan

    *_, layout, most = CHIPS[args.chip]
    devices = Devices(args, slots.LOG)
    settings = SamplingConfig(max_tokens=args.max_tokens, drafts=0)
    run = Sampler(workloads.shape("1.5B", 2**16), settings, (0,), dtype=jnp.float32, layout=layout)
    run.weights = {}
    each = min(most, -(-args.responses // (args.devices * 32)) * 32)
    length = -(-(args.prompt + args.max_tokens) // 64) * 64
    run.plan = lambda *_: Plan(each, length, each * length // cache.page_size(layout))  # pages for all
    requests = [
        Request((1,) * args.prompt, i, tuple(range(args.samples))) for i in range(args.responses // args.samples)
    ]
    names = ("empty", "start", "take", "stop", "decode")
    stand_in = SimpleNamespace(
        **{name: getattr(devices, name) for name in names},
        prefill=lambda *_: [None],
        insert=lambda p, layers, prompts, copies: layers,
        together=slots.together,
        logged=slots.logged,
    )
    began, tokens = time.perf_counter(), 0
    with mock.patch.multiple(sampler, device=stand_in, AHEAD=()):  # there is nothing to compile
        for completion in run.sample(requests, 0):
            tokens += len(completion.tokens)
    seconds = time.perf_counter() - began if args.real else devices.now
    return tokens, seconds, devices.busy / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v6e", choices=CHIPS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=256, help="of each question")
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--mean", type=float, default=488, help="tokens of a response")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--visit", type=float, default=4e-3, help="seconds that the host takes for each of its visits")
    parser.add_argument("--real", action="store_true", help="time passes, and the host takes what it takes here")
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(args.devices))
    tokens, seconds, share = simulate(args)
    print(
        f"{args.chip} × {args.devices}: {tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{tokens / seconds / args.devices:,.0f} on each; the devices work {share:.1%} of the time"
    )


if __name__ == "__main__":
    main()
