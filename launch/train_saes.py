"""Trains a sparse dictionary of every model, layer and seed on the stored activations.

python -m launch.train_saes --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.activations.untrained import open_controls
    from crossdict_jax.dictionaries.train import train_dictionaries

    store = open_store(work.activations)
    train_dictionaries(config, store, work, open_controls(config, work, store))


if __name__ == "__main__":
    command.run(main, table="training_table")
