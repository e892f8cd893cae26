"""All measurements of speed, at sizes for two CPU cores.

python -m launch.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
"""

from crossdict_jax.benchmark_config import BenchmarkConfig


def get_config() -> BenchmarkConfig:
    return BenchmarkConfig()
