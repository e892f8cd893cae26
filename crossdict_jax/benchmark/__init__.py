"""Side by side with other libraries: the same rows and settings, theirs in a process of its own."""

from crossdict_jax.benchmark.saelens import compare_saelens

__all__ = ["compare_saelens"]
