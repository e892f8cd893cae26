"""Measures how fast this code is: beside other libraries, other sizes and another checkout of it.

python -m launch.benchmark
python -m launch.benchmark --config.benchmarks=steps,map --workdir=runs/benchmark-some

Every figure is a ratio of contenders that took turns in one run. Other libraries run in Pythons of
their own, named by CROSSDICT_SAELENS_PYTHON, CROSSDICT_SPARSIFY_PYTHON,
CROSSDICT_DICTIONARY_LEARNING_PYTHON and CROSSDICT_TORCH_PYTHON, and CROSSDICT_BASELINE names the
folder of another checkout; those that are not named are left out. How good dictionaries are beside
those of SAELens: python -m launch.benchmark.saelens.
"""

from crossdict_jax.config import BenchmarkConfig
from launch import command


def main(config, work):
    from crossdict_jax.benchmark.run import run_benchmarks

    run_benchmarks(config, work)


if __name__ == "__main__":
    command.run(main, kind=BenchmarkConfig, default="benchmark")
