"""The main job in a few minutes on two cores, offline: the two embedded models on docstrings.

python -m launch.experiment
"""

from crossdict_jax.config import (
    Config,
    CrosscoderConfig,
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
        # Not the crosscoder, whose joint code would be trained once more for every control.
        control_kinds=("token", "procrustes", "ridge", "ridge_codes", "token_ridge", "mlp"),
        control_pairs=1,  # the middle layer: controls cost as much again as what they control
        text=TextConfig(
            source="docstrings",  # what every installation has
            documents=150,  # modules; a fifth held out makes intervals of a few hundredths
            max_bytes=700,  # of each: about 240 tokens, so many documents rather than long ones
        ),
        sae=SAEConfig(
            architecture="topk",
            width=384,  # 3 to 4 times d_model
            k=16,
            steps=600,  # of 512 rows: each row is seen about fourteen times
            batch_size=512,
        ),
        map=MapConfig(
            steps=300,
            batch_size=128,
            hidden=256,  # two thirds of the width of a dictionary
            learning_rate=5e-3,  # high, for few steps
        ),
        crosscoder=CrosscoderConfig(
            steps=300,  # enough to read one model from the other; too few to tell whose latents are
            learning_rate=3e-3,
        ),
        intervention=InterventionConfig(
            documents=16,
            features=12,  # in either direction, at the middle layers
            maps=("ridge", "mlp"),  # the linear one, and the network
        ),
    )
