"""The embedded GPT-2 shape: 8 layers of 128, 4096 tokens of its own, trained on docstrings.

python -m launch.train_lm --config=configs/docs_gpt2.py --workdir=runs/docs-gpt2
"""

from crossdict_jax.config import PretrainConfig, TextConfig


def get_config() -> PretrainConfig:
    return PretrainConfig(
        model_type="gpt2",
        d_model=128,
        n_layers=8,  # so that layers 5, 6 and 7 exist, as in the pair that this one stands for
        n_heads=4,
        context=256,
        vocab_size=4096,
        steps=1700,  # times 16 x 256 tokens: about 7M tokens, two and a half epochs
        batch_size=16,
        learning_rate=3e-3,
        text=TextConfig(source="docstrings", documents=1_000_000, max_bytes=1_000_000),  # all
    )
