"""All measurements of speed, at sizes for two CPU cores.

python -m launch.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
python -m launch.benchmark --suite=gpu --workdir=runs/benchmark-gpu
"""

from crossdict_jax.config import BenchmarkConfig


def get_config() -> BenchmarkConfig:
    return BenchmarkConfig()
