"""Runs of the pipeline on the embedded language models, small enough for a gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.activations.extract import extract
from crossdict_jax.config import (
    Config,
    EvaluationConfig,
    ExtractConfig,
    MapConfig,
    SAEConfig,
    TextConfig,
    to_dict,
)
from crossdict_jax.dictionaries import train_dictionaries
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir, open_workdir

SITE = Site(6)  # of 8 layers: late enough for context, early enough to be changed by later ones


def real_config(
    models: Sequence[str], *, documents: int, kinds: Sequence[str], seed: int = 0, **sae
) -> Config:
    """Returns the settings of a run on docstrings at one site.

    Args:
      sae: settings of the dictionaries that differ from a small and short training.
    """
    return Config(
        models=tuple(models),
        layers=(SITE.layer,),
        seed=seed,
        text=TextConfig(documents=documents, max_bytes=700, window_tokens=128),
        extract=ExtractConfig(batch_size=32),
        sae=SAEConfig(**{"width": 256, "k": 16, "steps": 200, "batch_size": 512} | sae),
        map=MapConfig(kinds=tuple(kinds)),
        evaluation=EvaluationConfig(bootstrap=100),
    )


def extracted(config: Config, directory: Path) -> Workdir:
    """Reads the text with the models; returns the run."""
    work = open_workdir(directory, to_dict(config))
    extract(config, work)
    return work


def trained(config: Config, directory: Path) -> Workdir:
    """Reads the text with the models and trains their dictionaries; returns the run."""
    from crossdict_jax.activations.store import open_store

    work = extracted(config, directory)
    train_dictionaries(config, open_store(work.activations), work)
    return work
