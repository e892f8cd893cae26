"""Fits every map between the models' features, in both directions, also on shuffled pairs.

python -m launch.train_hypernetworks --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.maps.fit import fit_controls, fit_maps

    store = open_store(work.activations)
    fit_maps(config, store, work)
    fit_controls(config, store, work)


if __name__ == "__main__":
    command.run(main, table="map_table")
