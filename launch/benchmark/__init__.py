"""Comparisons with other libraries; ``python -m launch.benchmark`` says which there are."""
