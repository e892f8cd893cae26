"""Pythia-410m-deduped and GPT-2 Medium on WikiText-103: the settings usual for this pair.

python -m launch.experiment --config=configs/pythia410m_gpt2medium.py --workdir=runs/pythia-gpt2

For one GPU or more; both models and the text come from the hub. Where a setting that is in use
for this pair cannot answer the question, another one stands here, and a comment says why.
"""

from crossdict_jax.config import Config, LossWeights, MapConfig, SAEConfig, TextConfig


def get_config() -> Config:
    return Config(
        models=("EleutherAI/pythia-410m-deduped", "openai-community/gpt2-medium"),
        layers=(5, 6, 7),  # of 24 in both
        site="resid_pre",
        text=TextConfig(
            # A row of WikiText is a paragraph or a heading, so paragraphs of one article can lie in
            # different splits. Usual is no split at all: maps scored on their own rows.
            source="hf:Salesforce/wikitext:wikitext-103-raw-v1:train:text",
            documents=2000,
            max_bytes=1200,  # about 256 tokens; all of their common positions, not 64 words each
            window_tokens=256,
        ),
        sae=SAEConfig(
            # Usual is an L1 of 1e-4 on the mean over batch and width, which leaves half of all
            # features active: their mean alone scores a cosine above 0.5.
            architecture="topk",
            width=4096,
            k=64,
            learning_rate=2e-3,
            steps=2500,
            batch_size=1024,
        ),
        map=MapConfig(
            hidden=512,
            dropout=0.1,  # while training only
            steps=1000,
            batch_size=128,
            # Usual is 1e-3 and ReLU, which on small pairs leaves the network far from done and its
            # predictions several times too dense.
            learning_rate=3e-3,
            head="jumprelu",
            # The usual sparsity loss compares (p == 0) with (t == 0) and has no gradient.
            loss_weights=LossWeights(mse=1.0, cosine=1.0, correlation=0.05, sparsity=0.01),
        ),
    )
