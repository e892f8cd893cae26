"""Trains a sparse dictionary of every model, layer and seed on the stored activations.

python -m launch.train_saes --workdir=runs/ab
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.dictionaries import train_dictionaries

    train_dictionaries(config, open_store(work.activations), work)


if __name__ == "__main__":
    command.run(main)
