"""Language models: Flax ports loaded from Hugging Face folders, read and edited at sites."""

from crossdict_jax.models.base import (
    KINDS,
    LanguageModel,
    ModelConfig,
    Past,
    Site,
    capture,
    check_sites,
)
from crossdict_jax.models.folders import ASSETS, EMBEDDED, load_tokenizer
from crossdict_jax.models.hf import init, known_config, load, load_config, model_types, save

__all__ = [
    "ASSETS",
    "EMBEDDED",
    "KINDS",
    "LanguageModel",
    "ModelConfig",
    "Past",
    "Site",
    "capture",
    "check_sites",
    "init",
    "known_config",
    "load",
    "load_config",
    "load_tokenizer",
    "model_types",
    "save",
]
