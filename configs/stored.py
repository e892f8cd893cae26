"""The settings that a work directory was made with, read from its config.json.

python -m launch.experiment --config=configs/stored.py:runs/quickstart --workdir=runs/again

A command that gets a --workdir with results and no --config uses them by itself.
"""

from pathlib import Path
from typing import Any

from crossdict_jax.config.settings import read


def get_config(workdir: str) -> Any:
    return read(Path(workdir) / "config.json")
