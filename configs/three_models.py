"""One sparse code of three models: the two embedded ones, and the first of them a second time.

python -m launch.experiment --config=configs/three_models.py --workdir=runs/three

Offline, a few minutes on two cores. The copy is a null of model diffing: a latent exclusive to
docs-gpt2 or to docs-gpt2-2 is invented. For a third model of your own, of any width and tokenizer:
--models=docs-gpt2,docs-neox,PATH.
"""

from configs import quickstart
from crossdict_jax.config import Config, CrosscoderConfig, InterventionConfig, MapConfig


def get_config() -> Config:
    like = quickstart.get_config()
    return Config(
        models=("docs-gpt2", "docs-neox", "docs-gpt2"),
        layers=(6,),
        text=like.text,
        sae=like.sae,
        map=MapConfig(kinds=("mean", "token", "ridge", "crosscoder")),
        crosscoder=CrosscoderConfig(
            width=768,  # what two different models have to say, and their common part
            steps=1500,
            learning_rate=3e-3,
            drop_probability=0.25,  # rows without a model blur whose a latent is
            self_nulls=1,  # docs-gpt2 beside itself, and beside a rotated copy
        ),
        intervention=InterventionConfig(documents=16),
    )
