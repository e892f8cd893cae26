"""The main job, every stage in order: text in, dictionaries, maps, measurements and a report out.

python -m launch.experiment
python -m launch.experiment --models=a,b --layers=5,6,7 --width=4096 --workdir=runs/ab

It can be interrupted and run again: what is finished is kept.
"""

from crossdict_jax.workdir import say
from launch import (
    command,
    evaluate,
    extract_activations,
    intervene,
    report,
    train_hypernetworks,
    train_saes,
)

STAGES = (extract_activations, train_saes, train_hypernetworks, evaluate, intervene, report)


def main(config, work):
    import jax

    from crossdict_jax.dictionaries.train import check_products
    from crossdict_jax.training.stage import free_memory

    check_products(config.sae.products)  # before hours of reading
    for number, stage in enumerate(STAGES, start=1):
        say(f"[{number}/{len(STAGES)}] {stage.__name__.rpartition('.')[2]}")
        stage.main(config, work)
        if stage in (train_saes, train_hypernetworks):
            jax.clear_caches()  # nothing else uses their programs, which take up to 0.3 GB
        free_memory()


if __name__ == "__main__":
    command.run(main)
