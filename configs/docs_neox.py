"""The embedded GPT-NeoX shape: 8 layers of 128, 1024 tokens of its own, trained on docstrings.

python -m launch.train_lm --config=configs/docs_neox.py --workdir=runs/docs-neox
"""

from crossdict_jax.config import PretrainConfig, TextConfig


def get_config() -> PretrainConfig:
    return PretrainConfig(
        model_type="gpt_neox",
        d_model=128,  # another width and another tokenizer than the GPT-2 shape
        n_layers=8,
        n_heads=4,  # of 32, a quarter of it rotated
        context=128,
        vocab_size=1024,
        steps=2400,  # times 16 x 128 tokens: 4.9M tokens, 1.1 epochs
        batch_size=16,
        learning_rate=4e-3,
        seed=1,
        text=TextConfig(source="docstrings", documents=1_000_000, max_bytes=1_000_000),  # all
    )
