"""The embedded GPT-2 shape: 8 layers of 96, 2048 tokens of its own, trained on docstrings.

python -m launch.train_lm --config=configs/docs_gpt2.py --workdir=runs/docs-gpt2
"""

from crossdict_jax.config import PretrainConfig, TextConfig


def get_config() -> PretrainConfig:
    return PretrainConfig(
        model_type="gpt2",
        d_model=96,
        n_layers=8,  # so that layers 5, 6 and 7 exist, as in the pair that this one stands for
        n_heads=4,
        context=128,
        vocab_size=2048,
        steps=3000,  # times 16 x 128 tokens: 6.1M tokens, 1.6 epochs
        batch_size=16,
        learning_rate=4e-3,
        text=TextConfig(source="docstrings", documents=1_000_000, max_bytes=1_000_000),  # all
    )
