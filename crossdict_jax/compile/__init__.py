"""Compiles a run's programs for a machine that need not be here: memory, time and what fits."""
