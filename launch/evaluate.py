"""Measures dictionaries and maps on held-out documents, from their checkpoints alone.

python -m launch.evaluate --workdir=runs/ab
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.evaluation.evaluate import evaluate

    evaluate(config, work)


def main_and_table(config: Config, work: Workdir) -> None:
    from crossdict_jax.report import summary_table

    main(config, work)
    summary_table(work)


if __name__ == "__main__":
    command.run(main_and_table)
