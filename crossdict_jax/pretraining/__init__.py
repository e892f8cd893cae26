"""Small language models of our own, trained from a corpus into Hugging Face folders."""

from crossdict_jax.pretraining.baselines import bigram_loss, unigram_loss
from crossdict_jax.pretraining.language_model import train_language_model

__all__ = ["bigram_loss", "train_language_model", "unigram_loss"]
