"""The generated parts of README.md and of the pages in docs/."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax import results
from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir, write_text


def write_docs(config: Config, work: Workdir, root: Path) -> list[Path]:
    """Writes the page about result files, and returns the paths of all that was written.

    Args:
      work: a finished run.
      root: the folder of the project.
    """
    page = root / "crossdict_jax/docs/results.md"
    write_text(page, results.page())
    return [page]
