"""Trains each dictionary again, from random parameters and from the other models' dictionaries.

python -m launch.transfer_dictionaries --workdir=runs/ab

Prints how many steps the transferred start saves; the curves lie in
results/dictionary_training.jsonl and in the report. Needs a run whose dictionaries are trained.
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.studies.dictionary_transfer.warm_start import compare_starts

    for row in compare_starts(config, open_store(work.activations), work):
        saved = "none" if row["saved"] is None else f"{100 * row['saved']:.0f} %"
        print(
            f"{row['source']} {row['site_source']} to {row['target']} {row['site_target']}: "
            f"{saved} of the steps saved; FVU {row['fvu_transferred']:.3f} from the transferred "
            f"start, {row['fvu_random']:.3f} from a random one"
        )


if __name__ == "__main__":
    command.run(main)
