"""The settings that a work directory was made with, read from its config.json.

python -m launch.experiment --config=configs/stored.py:runs/quickstart --workdir=runs/again

A command that gets an existing --workdir and no --config uses them by itself.
"""

from pathlib import Path

from crossdict_jax.config import Config, PretrainConfig
from crossdict_jax.settings import from_dict
from crossdict_jax.workdir import read_json


def get_config(workdir: str) -> Config | PretrainConfig:
    tree = read_json(Path(workdir) / "config.json")
    return from_dict(PretrainConfig if "model_type" in tree else Config, tree)
