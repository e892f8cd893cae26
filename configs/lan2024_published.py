"""Feature universality as Lan et al. 2024 published it: Pythia-70m against Pythia-160m.

python -m launch.experiment --config=configs/lan2024_published.py \
    --expect=configs/lan2024_published.py

Sparse Autoencoders Reveal Universal Feature Spaces Across Large Language Models, arXiv 2410.06981;
the notebooks of wlg1/univ_feat_geom. As there, and unlike the training of the dictionaries:
`layers.N` reads the input of block N, not its output, and codes are those before TopK. Unlike
there, padding is not counted as text. configs/lan2024_corrected.py does all three properly.
"""

from crossdict_jax.config import Config, EvaluationConfig, MapConfig, SAEConfig, TextConfig
from crossdict_jax.config.expectations import Expectation

SOURCE = "Lan et al. 2024, arXiv 2410.06981"


def get_config() -> Config:
    return Config(
        models=("EleutherAI/pythia-70m", "EleutherAI/pythia-160m"),
        layer_pairs="2:5",
        site="resid_pre",
        text=TextConfig(
            source="hf:Skylion007/openwebtext:plain_text:train:text",
            documents=300,
            max_bytes=2048,
            window_tokens=300,
        ),
        sae=SAEConfig(
            sources=(
                "hub:EleutherAI/sae-pythia-70m-32k/layers.{layer}",
                "hub:EleutherAI/sae-pythia-160m-32k/layers.{layer}",
            ),
            source_codes="relu",
            source_names="ignore",  # they say that they are of the output of the block
        ),
        map=MapConfig(kinds=("mean", "token", "ridge")),
        evaluation=EvaluationConfig(matching="mutual_best"),
        controls=(),  # a second seed of these dictionaries was not published
    )


def get_expectations() -> tuple[Expectation, ...]:
    matches = ("matching.jsonl", {"pairing": "aligned"})
    decoders = ("similarity.jsonl", {"kind": "decoders"})
    numbers = (  # in words, the rows, their column, what is near enough, as published
        ("mean correlation of one-to-one matches", matches, "r_train", 0.49, 0.69, "0.594"),
        ("SVCCA of their decoder rows", decoders, "svcca", 0.58, 0.78, "0.678"),
        ("SVCCA of rows matched at random", decoders, "svcca_null", -0.05, 0.06, "0.011"),
        ("RSA of their decoder rows", decoders, "rsa", 0.1, 0.3, "0.207"),
    )
    return tuple(
        Expectation(words, file, key, low, high, published, SOURCE, where)
        for words, (file, where), key, low, high, published in numbers
    )
