"""Causal tests: does what was predicted from one model work in the other?"""

from crossdict_jax.causal.feature_transfer import transfer_features
from crossdict_jax.causal.stitching import intervene

__all__ = ["intervene", "transfer_features"]
