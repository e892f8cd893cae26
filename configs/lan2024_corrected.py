"""Feature universality of Lan et al. 2024, with the dictionaries at the site they were trained on.

python -m launch.experiment --config=configs/lan2024_corrected.py \
    --expect=configs/lan2024_corrected.py

`layers.N` of these dictionaries is the output of block N (resid_post.N), and their codes are those
after TopK. No number was published for this, so only the null is expected; compare with
configs/lan2024_published.py.
"""

import dataclasses

from configs import lan2024_published
from crossdict_jax.config import Config
from crossdict_jax.config.expectations import Expectation


def get_config() -> Config:
    config = lan2024_published.get_config()
    sae = dataclasses.replace(config.sae, source_codes="own", source_names="check")
    return dataclasses.replace(config, site="resid_post", sae=sae)


def get_expectations() -> tuple[Expectation, ...]:
    return tuple(e for e in lan2024_published.get_expectations() if e.key.endswith("_null"))
