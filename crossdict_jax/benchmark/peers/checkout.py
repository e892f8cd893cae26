"""The same work in another checkout of this project, which CROSSDICT_BASELINE names."""

import subprocess
from pathlib import Path

import crossdict_jax
from crossdict_jax.benchmark import workloads


def make(workload: str, folder: str, **settings):
    run = getattr(workloads, workload)(Path(folder), **settings).run
    root = str(Path(crossdict_jax.__file__).parent)
    command = ["git", "-C", root, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return run, {"version": commit or "unknown"}
