"""Our own checkpoint folders; ``dictionaries.save`` writes them."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax.dictionaries.base import load
from crossdict_jax.training import checkpoint

__all__ = ["load", "recognises"]


def recognises(path: str) -> bool:
    """Whether ``path`` is a folder with a finished checkpoint."""
    return checkpoint.is_finished(Path(path))
