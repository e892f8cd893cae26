"""From documents to paired activations: text, pairing across tokenizers, extraction, the store."""

from crossdict_jax.activations.pairing import pair
from crossdict_jax.activations.text import load_corpus

__all__ = ["load_corpus", "pair"]
