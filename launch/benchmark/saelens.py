"""Trains dictionaries of ours and of SAELens on the same rows of a run, and prints both.

CROSSDICT_SAELENS_PYTHON=ENV/bin/python python -m launch.benchmark.saelens --workdir=runs/quickstart

ENV is an environment of its own (pip install sae-lens); without the variable nothing is done.
"""

import os

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.benchmark import compare_saelens
    from crossdict_jax.benchmark.saelens import PYTHON, best

    if not os.environ.get(PYTHON):
        print(f"skipped: {PYTHON} is not set; name the python of an environment with sae-lens.")
        return
    rows = compare_saelens(config, open_store(work.activations), work)
    print(f"FVU of {rows[0]['rows_test']} test rows at {config.sae.k} active features a row")
    for line in best(rows):
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values())
        print("  ".join(f"{cell:<12}" for cell in cells))


if __name__ == "__main__":
    command.run(main)
