"""The same pair on 100 short documents: to see every stage work with the real weights.

python -m launch.experiment --config=configs/pythia410m_gpt2medium_small.py

A few thousand rows cannot fill 4096 features, and 20 test documents give wide intervals: to learn
about the two models, use configs/pythia410m_gpt2medium.py.
"""

import dataclasses

from configs import pythia410m_gpt2medium
from crossdict_jax.config import Config


def get_config() -> Config:
    config = pythia410m_gpt2medium.get_config()
    text = dataclasses.replace(
        config.text,
        documents=100,
        max_bytes=600,  # about 128 tokens
        window_tokens=128,
    )
    return dataclasses.replace(config, text=text)
