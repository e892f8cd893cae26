"""Draws L0 against FVU for every architecture: on planted features and on a run's activations.

python -m launch.pareto --workdir=runs/ab

Needs the activations of a run (launch.extract_activations). launch.report shows the
curves on its page.
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.studies.pareto.section import print_tables
    from crossdict_jax.verify.recovery import measure_pareto

    measure_pareto(config, work)
    print_tables(work)


if __name__ == "__main__":
    command.run(main)
