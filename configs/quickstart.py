"""The main job in a few minutes on two cores, offline: the two embedded models on docstrings.

python -m launch.experiment
"""

from crossdict_jax.config import (
    Config,
    EvaluationConfig,
    InterventionConfig,
    MapConfig,
    SAEConfig,
    TextConfig,
)


def get_config() -> Config:
    return Config(
        models=(),  # the embedded pair
        layers=(5, 6, 7),  # of 8, as in the large presets
        site="resid_pre",
        text=TextConfig(
            source="docstrings",  # what every installation has
            documents=700,  # modules; a seventh of them makes intervals of a few hundredths
            max_bytes=1500,  # of each: about 400 tokens, so many documents rather than long ones
        ),
        sae=SAEConfig(
            architecture="topk",
            width=512,  # 3 to 4 times d_model
            k=16,
            steps=1200,  # of 512 rows: each row is seen a few times
            batch_size=512,
        ),
        map=MapConfig(
            steps=400,
            batch_size=128,
            hidden=256,  # half the width of a dictionary
        ),
        evaluation=EvaluationConfig(bootstrap=200),
        intervention=InterventionConfig(documents=48),
    )
