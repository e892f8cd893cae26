"""Model stitching of Chen et al. 2025: Pythia-70m-deduped, layer 3, into 160m, layer 4.

python -m launch.experiment --config=configs/chen2025_pythia.py --expect=configs/chen2025_pythia.py

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

SMALL, LARGE = "pythia-70m-deduped", "pythia-160m-deduped"  # as the runs name them
SOURCE = "Chen et al. 2025, arXiv 2506.06609"
STITCHED = {
    "source": SMALL,
    "target": LARGE,
    "map": "ridge",
    "pairing": "aligned",
    "stitch_kind": "activation",
}


def get_config() -> Config:
    return Config(
        models=("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-160m-deduped"),
        layer_pairs="3:4",
        site="resid_pre",
        text=TextConfig(
            source="hf:Skylion007/openwebtext:plain_text:train:text",
            documents=4000,
            max_bytes=8192,
            window_tokens=512,
        ),
        # The dictionaries of the paper are not published with it: ours are of a usual size.
        sae=SAEConfig(architecture="topk", width=16384, k=32, steps=20_000, batch_size=4096),
        map=MapConfig(kinds=("mean", "token", "procrustes", "ridge")),
        intervention=InterventionConfig(documents=256),
    )


def get_expectations() -> tuple[Expectation, ...]:
    return (
        Expectation(
            "cross-entropy of Pythia-160m going on from Pythia-70m",
            file="causal.jsonl",
            key="ce",
            where=STITCHED,
            low=3.79,
            high=4.19,
            published="3.99",
            source=SOURCE,
        ),
        Expectation(
            "FVU of the small model's dictionary, moved without training",
            file="dictionary_transfer.jsonl",
            key="fvu",
            where={"dictionary": "transferred", "source": SMALL, "target": LARGE},
            low=0.42,
            high=0.62,
            published="0.52",
            source=SOURCE,
        ),
    )
