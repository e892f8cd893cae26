"""Trains the mlp with each loss alone and left out, on a finished run's store and dictionaries.

python -m launch.ablate_losses --workdir=runs/quickstart

Prints a table per direction and pair of sites, writes results/ablation.jsonl, and shows it in the
report when that is made again.
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.studies.loss_ablation.measure import run

    run(config, work)


if __name__ == "__main__":
    command.run(main)
