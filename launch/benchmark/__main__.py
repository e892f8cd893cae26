"""Says which comparisons with other libraries there are, and runs all that this machine can.

python -m launch.benchmark --workdir=runs/quickstart
"""

import importlib
from pathlib import Path

from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir
from launch import command


def main(config: Config, work: Workdir) -> None:
    for name in sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")):
        comparison = importlib.import_module(f"launch.benchmark.{name}")
        print(f"{name}: {comparison.__doc__.splitlines()[0]}")
        comparison.main(config, work)


if __name__ == "__main__":
    command.run(main)
