"""The settings that a work directory was made with, read from its config.json.

python -m launch.experiment --config=configs/stored.py:runs/quickstart --workdir=runs/again

A command that gets an existing --workdir and no --config uses them by itself.
"""

from pathlib import Path

from crossdict_jax.config import (
    BenchmarkConfig,
    Config,
    ConvertConfig,
    PretrainConfig,
    VerifyConfig,
)
from crossdict_jax.config.settings import from_dict
from crossdict_jax.workdir import read_json

KINDS = {  # by a setting of theirs alone
    "model_type": PretrainConfig,
    "hook_name": ConvertConfig,
    "gates": VerifyConfig,
    "benchmarks": BenchmarkConfig,
}


def get_config(
    workdir: str,
) -> Config | PretrainConfig | ConvertConfig | VerifyConfig | BenchmarkConfig:
    tree = read_json(Path(workdir) / "config.json")
    kind = next((kind for name, kind in KINDS.items() if name in tree), Config)
    return from_dict(kind, tree)
