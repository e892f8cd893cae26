"""All gates: known answers that the whole machine must give, offline.

python -m launch.verify --config=configs/verify.py --workdir=runs/verify
"""

from crossdict_jax.config import VerifyConfig


def get_config() -> VerifyConfig:
    return VerifyConfig()
