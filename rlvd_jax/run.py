"""The command line: python -m rlvd_jax.run [CONFIG] [key=value ...]

Runs a study: trains and samples what is not there yet, grades, analyses and writes the page. Without CONFIG it is the
demo, the paper in miniature on a laptop's CPU. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import signal
import sys
import time
from pathlib import Path

from rlvd_jax import config as settings
from rlvd_jax.errors import UserError, nearest

# What a user can put right when something cannot be written: no space, no right to.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
CONFIGS = (Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs")


def config_path(name: str) -> Path:
    """The file that CONFIG means: a path, or the name of a config that comes with the package."""
    if Path(name).is_file() or name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    found = {path.stem: path for folder in CONFIGS for path in folder.glob("*.yaml")}
    if name not in found:
        raise UserError(f"{name}: neither a file nor a config of the package{nearest(name, found)}")
    return found[name]


def prepare_device(device: str) -> None:
    """Settings that must stand before JAX starts, then JAX itself; UserError if there is no such device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from rlvd_jax import hosts

    if device != "auto":
        jax.config.update("jax_platforms", "cuda" if device == "gpu" else device)
    hosts.start(device)
    try:
        backend = jax.default_backend()
    except Exception as error:  # RuntimeError, or AssertionError where JAX has no plugin for it
        reason = (str(error).splitlines() or ["JAX has no plugin for it: install the extra cuda or tpu"])[0]
        name = "device" if device == "auto" else device
        raise UserError(f"device: there is no {name} that JAX can use here ({reason})") from None
    if device not in ("auto", backend):
        raise UserError(f"device: JAX runs on {backend} in this process already, so it cannot take the {device}")
    if backend != "cpu":
        # Compiling for an accelerator takes minutes; what was compiled once is kept.
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlvd_jax" / "compiled"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            if not jax.config.jax_compilation_cache_dir:
                jax.config.update("jax_compilation_cache_dir", str(cache))


def write_config(study) -> None:
    """The study's settings, overrides and defaults in, beside its results: a config that repeats it."""
    import yaml

    path = study.root / "config.yaml"
    temporary = path.with_name(".config.yaml.tmp")
    temporary.write_text(yaml.safe_dump(study.config.written(), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def only_one(root: Path):
    """Holds the study's lock; UserError if another process runs the same study."""
    import fcntl

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"{root}: results cannot be written there: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{root}: another process runs this study; wait for it or give the study another name"
            ) from None
        yield


def check_arithmetic(study, dtype: str) -> None:
    """With `dtype: auto` the device decides the arithmetic; UserError where this one differs from the first."""
    if study.config.dtype != "auto":
        return
    path = study.root / "arithmetic"
    if not path.exists():
        path.write_text(dtype + "\n")
    elif (first := path.read_text().strip()) != dtype:
        raise UserError(
            f"{study.root}: was begun in {first}, and dtype: auto is {dtype} on this device; go on on the other "
            "kind of device, or give the study another name"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlvd_jax.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="demo", help="a YAML file or a config's name (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: sampling.samples=64")
    parser.add_argument(
        "--plan", action="store_true", help="print the steps, what is done and what each costs; do nothing"
    )
    parser.add_argument(
        "--target",
        metavar="SLICE",
        help="with --plan: does each step fit on this TPU slice, v5e:4x4, v5p-8 or the like? No TPU is needed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_intermixed_args(argv)
    if "=" in args.config and not Path(args.config).is_file():
        args.overrides.insert(0, args.config)
        args.config = "demo"
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run(args)
    except UserError as error:
        print(f"rlvd_jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "the study's folder"
        print(f"rlvd_jax: {where}: {error.strerror}; put that right, and the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    config = settings.load(config_path(args.config), args.overrides)
    from rlvd_jax.study import Study

    study = Study(config)
    if args.target:
        if not args.plan:
            raise UserError("--target goes with --plan: it tells what fits on a slice, without using one")
        prepare_device("cpu")  # compiling for a slice needs no other, and takes no TPU away
        from rlvd_jax import targets
        from rlvd_jax.target_plan import plan_on

        print(plan_on(study, targets.find(args.target), lambda line: print(line, file=sys.stderr, flush=True)))
        return 0
    if args.plan:
        from rlvd_jax.plan import plan

        print(plan(study))
        return 0
    for step in study.steps:  # bad input is told before anything is computed: this looks at every set of problems ...
        study.identity(step.model)
        if step.problems:
            study.problems(step.problems)
    prepare_device(config.device)
    from rlvd_jax import hosts

    with contextlib.ExitStack() as held:
        hosts.from_first(lambda: held.enter_context(only_one(study.root)))
        held.enter_context(hosts.session(study.root, study.digest()))
        work_through(study, quiet=args.quiet, start=start)
    return 0


def work_through(study, quiet: bool, start: float) -> None:
    """Do all that is left to do of a study, and write and print its results. start: when the command began."""
    from rlvd_jax import hosts
    from rlvd_jax.grading import Grader
    from rlvd_jax.plan import architecture
    from rlvd_jax.publish import publish
    from rlvd_jax.report import summary_table
    from rlvd_jax.work import Work

    config, first = study.config, hosts.first()
    say = functools.partial(print, flush=True) if first else lambda *_: None
    todo = hosts.from_first(lambda: [step for step in study.steps if not study.done(step)])
    for step in todo:
        architecture(study, step.model)  # ... and at every configuration of a checkpoint
    hosts.from_first(lambda: write_config(study))
    say(f"{config.study}: {len(study.steps)} steps, {len(study.steps) - len(todo)} done; results in {study.root}")
    with Grader(config.grader.workers, config.grader.deadline) as grader:
        work = Work(study, grader, progress=not quiet and first)
        hosts.from_first(lambda: check_arithmetic(study, work.dtype.name))
        for i, step in enumerate(todo):
            say(f"[{i + 1}/{len(todo)}] {step.name}")
            began = time.monotonic()
            work.run(step)
            say(f"      {time.monotonic() - began:,.0f} s")

        def results():
            results, page = publish(study, grader, lambda line: say(f"[report] {line}"), bars=not quiet)
            say(f"\n{summary_table(results)}")
            minutes, seconds = divmod(round(time.monotonic() - start), 60)
            say(f"\npage: {page} ({minutes} min {seconds} s)")

        hosts.from_first(results)


if __name__ == "__main__":
    sys.exit(main())
