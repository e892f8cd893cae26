"""Lets a model write with a feature of another model put in, beside the same text without it.

python -m launch.steer --workdir=runs/ab --config.steer.feature=17
python -m launch.steer --workdir=runs/ab --config.steer.search=himself --config.steer.samples=32

Needs a run with maps. Prints the texts side by side and how often the tokens that the feature
promotes occur in each; all of it lies in results/steering/ and in report/steering.html.
"""

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    from crossdict_jax.report import write_steering
    from crossdict_jax.studies.steering.measure import steer
    from crossdict_jax.studies.steering.section import print_answer

    print_answer(work, steer(config, work))
    print(write_steering(config, work))


if __name__ == "__main__":
    command.run(main)
