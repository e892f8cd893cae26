"""Draws L0 against FVU for every architecture: on planted features and on a run's activations.

python -m launch.pareto --workdir=runs/ab

Needs the activations of a run (launch.extract_activations). launch.report shows the
curves on its page.
"""

from launch import command


def main(config, work):
    from crossdict_jax.report.tables import show
    from crossdict_jax.studies.pareto import curves, tables
    from crossdict_jax.verify.recovery import measure_pareto

    show(tables(curves(measure_pareto(config, work))))


if __name__ == "__main__":
    command.run(main)
