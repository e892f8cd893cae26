"""Measures dictionaries and maps on held-out documents, from their checkpoints alone.

python -m launch.evaluate --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.evaluation.evaluate import evaluate

    evaluate(config, work)


if __name__ == "__main__":
    command.run(main, table="summary_table")
