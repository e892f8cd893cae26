"""Measurements of speed, and of quality beside SAELens."""
