"""Model stitching of Chen et al. 2025: GPT-2 small, layer 6, into GPT-2 medium, layer 10.

python -m launch.experiment --config=configs/chen2025_gpt2.py --expect=configs/chen2025_gpt2.py

Transferring Linear Features Across Language Models With Model Stitching, arXiv 2506.06609. One
tokenizer, so every position is paired. What the paper leaves open is said where it is chosen.
"""

from crossdict_jax.config import (
    Config,
    InterventionConfig,
    MapConfig,
    SAEConfig,
    TextConfig,
)
from crossdict_jax.expectations import Expectation

SMALL, MEDIUM = "gpt2", "gpt2-medium"  # as the runs name them
SOURCE = "Chen et al. 2025, arXiv 2506.06609"
STITCHED = {
    "source": SMALL,
    "target": MEDIUM,
    "map": "ridge",
    "pairing": "aligned",
    "stitch_kind": "activation",
}


def get_config() -> Config:
    return Config(
        models=("openai-community/gpt2", "openai-community/gpt2-medium"),
        layer_pairs="6:10",
        site="resid_pre",
        text=TextConfig(
            source="hf:Skylion007/openwebtext:plain_text:train:text",
            documents=4000,
            max_bytes=8192,
            window_tokens=512,
        ),
        # The dictionaries of the paper are not published with it: ours are of a usual size.
        sae=SAEConfig(architecture="topk", width=24576, k=32, steps=20_000, batch_size=4096),
        map=MapConfig(kinds=("mean", "token", "procrustes", "ridge")),
        intervention=InterventionConfig(documents=256),
    )


def get_expectations() -> tuple[Expectation, ...]:
    return (
        Expectation(
            "cross-entropy of GPT-2 medium going on from GPT-2 small",
            file="causal.jsonl",
            key="ce",
            where=STITCHED,
            low=2.93,
            high=3.23,
            published="3.08",
            source=SOURCE,
        ),
        Expectation(
            "cross-entropy of GPT-2 small itself",
            file="causal.jsonl",
            key="ce",
            where={"control": "clean", "target": SMALL},
            low=2.92,
            high=3.22,
            published="3.07",
            source=SOURCE,
        ),
        Expectation(
            "cross-entropy of GPT-2 medium itself",
            file="causal.jsonl",
            key="ce",
            where={"control": "clean", "target": MEDIUM},
            low=2.62,
            high=2.92,
            published="2.77",
            source=SOURCE,
        ),
        Expectation(
            "FVU of the small model's dictionary, moved without training",
            file="dictionary_transfer.jsonl",
            key="fvu",
            where={"dictionary": "transferred", "source": SMALL, "target": MEDIUM},
            low=0.29,
            high=0.49,
            published="0.39",
            source=SOURCE,
        ),
        Expectation(
            "what putting it in costs, in nats",
            file="dictionary_transfer.jsonl",
            key="delta_ce",
            where={"dictionary": "transferred", "source": SMALL, "target": MEDIUM},
            low=0.66,
            high=1.26,
            published="0.96",
            source=SOURCE,
        ),
    )
