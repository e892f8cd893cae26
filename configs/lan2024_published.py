"""Feature universality as Lan et al. 2024 published it: Pythia-70m against Pythia-160m.

python -m launch.experiment --config=configs/lan2024_published.py \
    --expect=configs/lan2024_published.py

Sparse Autoencoders Reveal Universal Feature Spaces Across Large Language Models, arXiv 2410.06981;
the notebooks of wlg1/univ_feat_geom. Two things are done here as they were there, though they are
not what the dictionaries were trained for: `layers.N` reads the output of block N and was given
its input, and the codes are those before TopK. One thing is not: there, padding was counted as
text. configs/lan2024_corrected.py does all three properly.
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
        ),
        map=MapConfig(kinds=("mean", "token", "ridge")),
        evaluation=EvaluationConfig(matching="mutual_best"),
        controls=(),  # a second seed of these dictionaries was not published
    )


def get_expectations() -> tuple[Expectation, ...]:
    matched = {"pairing": "aligned"}
    decoders = {"kind": "decoders"}
    return (
        Expectation(
            "mean correlation of one-to-one matches",
            file="matching.jsonl",
            key="r_train",
            where=matched,
            low=0.49,
            high=0.69,
            published="0.594",
            source=SOURCE,
        ),
        Expectation(
            "SVCCA of their decoder rows",
            file="similarity.jsonl",
            key="svcca",
            where=decoders,
            low=0.58,
            high=0.78,
            published="0.678",
            source=SOURCE,
        ),
        Expectation(
            "SVCCA of decoder rows matched at random",
            file="similarity.jsonl",
            key="svcca_null",
            where=decoders,
            low=-0.05,
            high=0.06,
            published="0.011",
            source=SOURCE,
        ),
        Expectation(
            "RSA of their decoder rows",
            file="similarity.jsonl",
            key="rsa",
            where=decoders,
            low=0.1,
            high=0.3,
            published="0.207",
            source=SOURCE,
        ),
    )
