"""Measures dictionaries and maps on held-out documents, from their checkpoints alone.

python -m launch.evaluate --workdir=runs/ab
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.evaluation.evaluate import evaluate

    evaluate(config, work)


if __name__ == "__main__":
    command.run(main, table="summary_table")
