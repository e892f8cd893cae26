"""Studies: questions asked of a finished run, a folder each.

A study has ``TABLE`` (its result file), ``TITLE``, ``section(rows) -> html`` and ``measure.run``.
"""

import importlib
import pkgutil

from crossdict_jax import results
from crossdict_jax.workdir import Workdir


def sections(work: Workdir) -> list[tuple[str, str]]:
    """Returns (title, html) of every study that has results."""
    shown = []
    for module in pkgutil.iter_modules(__path__):
        study = importlib.import_module(f"{__name__}.{module.name}")
        if not hasattr(study, "TITLE"):
            continue
        tables = [table for table in vars(study).values() if isinstance(table, results.Table)]
        files = sorted(file for table in tables for file in work.results.glob(table.file))
        rows = [
            row for file in files for row in results.read(work, str(file.relative_to(work.results)))
        ]
        if rows:
            shown.append((study.TITLE, study.section(rows)))
    return shown
