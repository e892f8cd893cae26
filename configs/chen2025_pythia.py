"""Model stitching of Chen et al. 2025: Pythia-70m-deduped, layer 3, into 160m, layer 4.

python -m launch.experiment --config=configs/chen2025_pythia.py
python -m launch.transfer_dictionaries --workdir=runs/chen2025_pythia \
    --expect=configs/chen2025_pythia.py

As configs/chen2025_gpt2.py, where the paper and the choices are named.
"""

import dataclasses

from configs import chen2025_gpt2
from configs.chen2025_gpt2 import FVU, LOSS, MOVED, STITCHED, expected
from crossdict_jax.config import Config
from crossdict_jax.config.expectations import Expectation

ENDS = {"source": "pythia-70m-deduped", "target": "pythia-160m-deduped"}  # as the runs name them


def get_config() -> Config:
    config = chen2025_gpt2.get_config()
    models = ("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-160m-deduped")
    sae = dataclasses.replace(config.sae, width=16384)
    return dataclasses.replace(config, models=models, layer_pairs="3:4", sae=sae)


def get_expectations() -> tuple[Expectation, ...]:
    stitched, moved = ENDS | STITCHED, ENDS | MOVED
    return (
        expected("cross-entropy of Pythia-160m going on from 70m", 3.99, 0.2, *LOSS, stitched),
        expected("FVU of 70m's dictionary, moved without training", 0.52, 0.1, *FVU, moved),
    )
