"""Processes that make one job, as those on several hosts do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environments(number: int, devices: int) -> list[dict[str, str]]:
    """What each of `number` processes with `devices` simulated devices has to be told."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(number),
            "JAX_PROCESS_ID": str(index),
        }
        for index in range(number)
    ]


def start(command: list, of_each: list[dict[str, str]], environment: dict[str, str], **options) -> list:
    """The processes, each with its part of the environment; their output, errors included, is to be read."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for own in of_each
    ]


def finish(processes: list, seconds: float = 200) -> list[tuple[int, str]]:
    """(exit status, output) of each; none is left running."""
    try:
        outputs = [p.communicate(timeout=seconds)[0] for p in processes]
        return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for p in processes:
            p.kill()
