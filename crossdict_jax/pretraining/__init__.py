"""Small language models of our own, trained from a corpus into Hugging Face folders."""

from crossdict_jax.pretraining.language_model import (
    bigram_loss,
    train_language_model,
    unigram_loss,
)

__all__ = ["bigram_loss", "train_language_model", "unigram_loss"]
