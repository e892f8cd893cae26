"""What the soak kills: one run that trains dictionaries of every architecture, one after another.

PYTHONPATH=. python tests/soak_run.py --workdir=WORKDIR

WORKDIR holds config.json and a store; dictionaries go to WORKDIR/ARCHITECTURE.
"""

import dataclasses

from crossdict_jax.config import Config, architectures
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.dictionaries.train import train_dictionaries

    store = open_store(work.activations)
    for architecture in architectures():
        sae = dataclasses.replace(config.sae, architecture=architecture)
        one, folder = dataclasses.replace(config, sae=sae), Workdir(work.root / architecture)
        train_dictionaries(one, store, folder)


if __name__ == "__main__":
    command.run(main)
