"""Causal tests: does what was predicted from one model do its work in the other?"""

from crossdict_jax.causal.contrast import measure_contrast
from crossdict_jax.causal.features import transfer_features
from crossdict_jax.causal.probe import measure_probes
from crossdict_jax.causal.steering import steer
from crossdict_jax.causal.stitching import intervene

__all__ = ["intervene", "measure_contrast", "measure_probes", "steer", "transfer_features"]
