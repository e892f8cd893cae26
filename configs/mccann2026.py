"""Seeds as rotations, McCann 2026: dictionaries of nine Pythia-70m seeds on each other.

python -m launch.experiment --config=configs/mccann2026.py
python -m launch.transfer_dictionaries --workdir=runs/mccann2026 --expect=configs/mccann2026.py

Polymorphism Is Rotation, arXiv 2605.24577. The dictionaries are trained here, on the paper's text;
their sizes are our choice. results/dictionary_transfer.jsonl has a row for each ordered pair of
seeds and way of reading one with the other's dictionary.
"""

from crossdict_jax.config import Config, MapConfig, SAEConfig, TextConfig
from crossdict_jax.config.expectations import Expectation

SOURCE = "McCann 2026, arXiv 2605.24577"


def get_config() -> Config:
    return Config(
        models=tuple(f"EleutherAI/pythia-70m-seed{n}" for n in range(1, 10)),
        layers=(3,),  # of 6
        site="resid_pre",
        text=TextConfig(
            source="hf:NeelNanda/pile-10k:default:train:text",
            documents=2000,
            max_bytes=4096,
            window_tokens=256,
        ),
        sae=SAEConfig(architecture="topk", width=4096, k=32, steps=5000, batch_size=2048),
        map=MapConfig(kinds=("mean", "token", "procrustes", "ridge")),
        controls=(),  # the seeds are each other's
    )


def get_expectations() -> tuple[Expectation, ...]:
    fvus = (  # the row's dictionary, in words, what is near enough, as published
        ("as_is", "of another seed's dictionary as it is", 0.25, 3.11, "0.25 to 3.11"),
        ("orthogonal", "through one rotation", 0.0, 0.2, "0.01 to 0.15"),
    )
    file, mean = "dictionary_transfer.jsonl", "mean over the pairs of seeds"
    return tuple(
        Expectation(f"FVU {words}, {mean}", file, "fvu", low, high, published, SOURCE, where)
        for dictionary, words, low, high, published in fvus
        for where in ({"dictionary": dictionary},)
    )
