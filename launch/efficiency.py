"""Measures what maps are worth in paired rows: maps on few rows, the hypernetwork on none.

python -m launch.efficiency --workdir=runs/ab

Needs the activations and dictionaries of a run (launch.extract_activations, launch.train_saes).
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.studies.efficiency.measure import run

    run(config, work)


if __name__ == "__main__":
    command.run(main)
