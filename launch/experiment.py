"""The main job, every stage in order: text in, dictionaries, maps, measurements and a report out.

python -m launch.experiment
python -m launch.experiment --models=a,b --layers=5,6,7 --width=4096 --workdir=runs/ab

It can be interrupted and run again: what is finished is kept.
"""

import time

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import (
    command,
    evaluate,
    extract_activations,
    intervene,
    report,
    train_hypernetworks,
    train_saes,
)

STAGES = (extract_activations, train_saes, train_hypernetworks, evaluate, intervene)


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.report import summary_table

    for number, stage in enumerate(STAGES, start=1):
        name = stage.__name__.rpartition(".")[2]
        print(f"[{number}/{len(STAGES) + 1}] {name}", flush=True)
        start = time.perf_counter()
        stage.main(config, work)
        print(f"[{number}/{len(STAGES) + 1}] {name} took {time.perf_counter() - start:.1f} s")
    summary_table(work)
    print(f"[{len(STAGES) + 1}/{len(STAGES) + 1}] report", flush=True)
    report.main(config, work)


if __name__ == "__main__":
    command.run(main)
