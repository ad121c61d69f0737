"""Kill a study at random moments, start it again each time, and see that it ends as if nothing had happened.

    python tools/kill_study.py CONFIG [key=value ...] [--kills 20] [--seed 0] [--keep FOLDER]

CONFIG runs undisturbed (twice, if JAX_COMPILATION_CACHE_DIR names no cache of what it compiles). Then the same command
is killed, by SIGTERM and SIGKILL in turn, at a moment drawn from the time that the undisturbed run took, and started
again, until it has been killed so often; when the study ends, it begins anew in another folder. After every run, what
had been kept before it must still be there and have been gone on from: shards of responses as they were, finished
trainings untouched, each other training from its newest checkpoint. In the end responses and verdicts, what the
trainings did, the weights to the last bit and results.json (but for its time and folder) must be those of the
undisturbed run. Status 1 if anything is not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from rlvd_jax import config as settings
from rlvd_jax.errors import UserError
from rlvd_jax.run import config_path
from rlvd_jax.study import Study

PATIENCE = 120  # seconds that a run may take to save and leave after SIGTERM
COLUMNS = ["problem_id", "sample", "text", "tokens", "stop", "answer", "correct"]


class Wrong(Exception):
    """The study is not what it should be."""


class Kept(NamedTuple):
    """What a study has on disk."""

    shards: dict[Path, str]  # digests
    finished: dict[str, int]  # model → time of its result
    checkpoint: dict[str, int]  # model → newest step
    begun: dict[str, dict[str, int]]  # model → event file → first step that it was to hold

    def describe(self) -> str:
        trained = ", ".join(f"{model} {step}" for model, step in self.checkpoint.items() if model not in self.finished)
        return f"{len(self.shards)} shards, {len(self.finished)} trainings" + (
            f", to step: {trained}" if trained else ""
        )


def first_step(path: Path) -> int:
    """The first step that an event file was to hold; -1 if the file ends before it says so."""
    for event in EventFileLoader(str(path)).Load():
        if event.HasField("session_log"):
            return event.step
    return -1


def look(study: Study) -> Kept:
    shards = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in study.root.glob("responses/*/shard-*.parquet")}
    finished, checkpoint, begun = {}, {}, {}
    for name, model in study.config.models.items():
        if model.from_ is not None:
            continue
        folder = study.training(name)
        with contextlib.suppress(FileNotFoundError):
            finished[name] = (folder / "result.json").stat().st_mtime_ns
        steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
        if steps:
            checkpoint[name] = max(steps)
        begun[name] = {p.name: first_step(p) for p in folder.glob("events/events.out.tfevents.*")}
    return Kept(shards, finished, checkpoint, begun)


def check_kept(before: Kept, now: Kept) -> None:
    """What was there at a kill is there after the next, and was gone on from."""
    for path, digest in before.shards.items():
        if now.shards.get(path) != digest:
            raise Wrong(f"{path} was sampled and kept, and is not there any more as it was")
    for name, at in before.finished.items():
        if now.finished.get(name) != at:
            raise Wrong(f"the training of {name} was finished, and was made again")
    for name, files in now.begun.items():
        kept = before.checkpoint.get(name)
        for file in files.keys() - before.begun.get(name, {}).keys():
            if name in before.finished:
                raise Wrong(f"the training of {name} was finished, and began again")
            if kept is not None and files[file] not in (-1, kept + 1):
                raise Wrong(f"{name} had a checkpoint of step {kept}, and went on with step {files[file]}")


def end(study: Study) -> dict:
    """All that must not depend on kills."""
    if left := [step.name for step in study.steps if not study.done(step)]:
        raise Wrong(f"ended with {left[0]} not done")
    trained = [name for name, model in study.config.models.items() if model.from_ is None]
    results = json.loads((study.report / "results.json").read_text(encoding="utf-8"))
    results.pop("created")
    results["settings"].pop("output")
    return {
        **{f"responses of {m} on {p}": study.responses(m, p).table(COLUMNS).to_pylist() for m, p in study.needed},
        **{f"training of {name}": study.result(name) for name in trained},
        **{
            f"checkpoint of {name}": {p.name: p.read_bytes() for p in study.checkpoint(name).iterdir()}
            for name in trained
        },
        "results.json": results,
    }


class Run:
    """The command, running."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self.log, self.began = log, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status; None if it still runs then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def at(self) -> str:
        """What it is, or was, doing."""
        found = re.findall(r"^\[(?:\d+/\d+|report)\] .*$", self.output(), re.MULTILINE)
        return found[-1] if found else "starting"

    def must_end(self, allowed: tuple[int, ...], seconds: float | None = None) -> int:
        status = self.wait(seconds)
        if status not in allowed:
            self.process.kill()
            raise Wrong(f"exit status {status} where {allowed} was expected; it said\n{self.output()[-2000:]}")
        return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="a folder for the studies and what they said (default: none is kept)")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return kill(args, args.keep or Path(temporary))
        except (Wrong, UserError) as error:
            print(f"\n{error}", file=sys.stderr)
            return 1


def kill(args: argparse.Namespace, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path, moments = config_path(args.config), random.Random(args.seed)
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compiled or str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def study(name: str) -> tuple[Study, list[str]]:
        overrides = [*args.overrides, f"output={folder / name}"]
        command = [sys.executable, "-m", "rlvd_jax.run", str(path), "--quiet", *overrides]
        return Study(settings.load(path, overrides)), command

    if not compiled:  # so that a run spends its time, and is killed, at its work
        Run(study("compiling")[1], folder / "compiling.log", environment).must_end((0,))
    whole, command = study("undisturbed")
    run = Run(command, folder / "undisturbed.log", environment)
    run.must_end((0,))
    seconds = time.monotonic() - run.began
    expected = end(whole)
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    kills = rounds = 0
    print(f"{'kill':>4} {'study':>5} {'signal':>7} {'after':>7} {'status':>6}  {'at':40} kept")
    while kills < args.kills:
        rounds += 1
        disturbed, command = study(f"killed-{rounds}")
        kept, status = look(disturbed), None
        while status != 0:
            run = Run(command, folder / f"killed-{rounds}-{kills + 1}.log", environment)
            moment = moments.uniform(0, seconds) if kills < args.kills else None
            if (status := run.wait(moment)) is None:
                number = (signal.SIGTERM, signal.SIGKILL)[kills % 2]
                run.process.send_signal(number)
                # 0: it was about to end, which is no kill; -SIGTERM: it had not begun to heed signals.
                status = run.must_end((128 + number, -number, 0), PATIENCE)
                kills += status != 0
            elif status != 0:
                run.must_end((0,))
            before, kept = kept, look(disturbed)
            check_kept(before, kept)
            if moment is not None and status != 0:
                line = f"{kills:4} {rounds:5} {number.name:>7} {moment:5.1f} s {status:6}  {run.at():40.40}"
                print(line, kept.describe(), flush=True)
        for what, value in end(disturbed).items():
            if value != expected[what]:
                raise Wrong(f"{what}: not as without kills, in {disturbed.root}")
    print(f"{kills} kills, {rounds} studies: all ended as undisturbed; nothing that was kept was made again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
