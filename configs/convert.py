"""Conversion of dictionaries into SAELens folders.

python -m launch.convert --workdir=exported --config.source=runs/ab
"""

from crossdict_jax.config import ConvertConfig


def get_config() -> ConvertConfig:
    return ConvertConfig(format="saelens")
