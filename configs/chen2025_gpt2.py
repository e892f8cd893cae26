"""Model stitching of Chen et al. 2025: GPT-2 small, layer 6, into GPT-2 medium, layer 10.

python -m launch.experiment --config=configs/chen2025_gpt2.py
python -m launch.transfer_dictionaries --workdir=runs/chen2025_gpt2 \
    --expect=configs/chen2025_gpt2.py

Transferring Linear Features Across Language Models With Model Stitching, arXiv 2506.06609. One
tokenizer, so every position is paired. What the paper leaves open is said where it is chosen.
"""

from typing import Any

from crossdict_jax.config import Config, InterventionConfig, MapConfig, SAEConfig, TextConfig
from crossdict_jax.config.expectations import Expectation

SMALL, MEDIUM = "gpt2", "gpt2-medium"  # as the runs name them
NEAR = 0.15  # nats: other documents of the same corpus, and windows of another length
# Files and columns, and which rows: of a target that goes on from the source through an affine
# map, and of the source's dictionary, used for the target without training.
LOSS, FVU = ("causal.jsonl", "ce"), ("dictionary_transfer.jsonl", "fvu")
STITCHED = {"map": "ridge", "pairing": "aligned", "stitch_kind": "activation"}
MOVED = {"dictionary": "transferred"}


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
        # The paper's dictionaries are not published: ours are of a usual size.
        sae=SAEConfig(architecture="topk", width=24576, k=32, steps=20_000, batch_size=4096),
        map=MapConfig(kinds=("mean", "token", "procrustes", "ridge")),
        intervention=InterventionConfig(documents=256),
    )


def expected(
    words: str, published: float, near: float, file: str, key: str, where: dict[str, Any]
) -> Expectation:
    """Returns an expectation of this paper: the published number, give or take ``near``."""
    low, high = published - near, published + near
    source = "Chen et al. 2025, arXiv 2506.06609"
    return Expectation(words, file, key, low, high, f"{published}", source, where)


def get_expectations() -> tuple[Expectation, ...]:
    ends, clean = {"source": SMALL, "target": MEDIUM}, {"control": "clean"}
    numbers = (
        ("cross-entropy of GPT-2 medium going on from small", 3.08, NEAR, *LOSS, ends | STITCHED),
        ("cross-entropy of GPT-2 small itself", 3.07, NEAR, *LOSS, clean | {"target": SMALL}),
        ("cross-entropy of GPT-2 medium itself", 2.77, NEAR, *LOSS, clean | {"target": MEDIUM}),
        ("FVU of small's dictionary, moved without training", 0.39, 0.1, *FVU, ends | MOVED),
        ("what putting it in costs, in nats", 0.96, 0.3, FVU[0], "delta_ce", ends | MOVED),
    )
    return tuple(expected(*number) for number in numbers)
