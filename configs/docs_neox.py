"""The embedded GPT-NeoX shape: 8 layers of 128, 1024 tokens of its own, trained on docstrings.

python -m launch.train_lm --config=configs/docs_neox.py --workdir=runs/docs-neox
"""

import dataclasses

from configs import docs_gpt2
from crossdict_jax.config import PretrainConfig


def get_config() -> PretrainConfig:
    return dataclasses.replace(
        docs_gpt2.get_config(),
        model_type="gpt_neox",
        d_model=128,  # another width and another tokenizer than the GPT-2 shape; heads of 32
        vocab_size=1024,
        steps=2400,  # 4.9M tokens, 1.1 epochs
        seed=1,
    )
