"""Uses each model's dictionaries for the others: as they are, and as a start of training.

python -m launch.transfer_dictionaries --workdir=runs/ab

Prints what moved dictionaries explain and how many training steps they save; the curves are in the
report. Needs a run whose dictionaries are trained.
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.studies.dictionary_transfer.measure import run

    run(config, work)


if __name__ == "__main__":
    command.run(main)
