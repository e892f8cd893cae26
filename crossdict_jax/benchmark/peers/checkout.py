"""The same work in another checkout of this project, which CROSSDICT_BASELINE names."""

from pathlib import Path

from crossdict_jax.benchmark import workloads
from crossdict_jax.report.docs import commit


def make(workload: str, folder: str, **settings):
    run = getattr(workloads, workload)(Path(folder), **settings).run
    return run, {"version": commit(Path(workloads.__file__).parent)}
