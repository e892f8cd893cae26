"""Trains dictionaries of ours and of SAELens on the same rows of a run: both, side by side.

CROSSDICT_SAELENS_PYTHON=ENV/bin/python python -m launch.benchmark.saelens --workdir=runs/quickstart

ENV is an environment of its own (pip install sae-lens); without the variable nothing is done.
"""

import os

from launch import command


def main(config, work):
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.benchmark.peer import VARIABLES
    from crossdict_jax.benchmark.saelens import compare_saelens, comparison
    from crossdict_jax.report.tables import show

    variable = VARIABLES["sae-lens"]
    if not os.environ.get(variable):
        print(f"skipped: {variable} is not set; name the python of an environment with sae-lens.")
        return
    show([comparison(compare_saelens(config, open_store(work.activations), work))])


if __name__ == "__main__":
    command.run(main)
