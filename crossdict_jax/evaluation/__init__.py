"""Held-out numbers of dictionaries and maps, with intervals over documents."""

from crossdict_jax.evaluation.evaluate import evaluate
from crossdict_jax.evaluation.transfer import transfer_metrics

__all__ = ["evaluate", "transfer_metrics"]
