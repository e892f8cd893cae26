"""Questions asked of a finished run; nothing below knows them.

A study is a folder here: it describes its result file (``TABLE``), gives ``TITLE`` and
``section(rows) -> html`` for the report, and its ``measure.run(config, work)`` writes and prints.
"""

import importlib
import pkgutil

from crossdict_jax import results
from crossdict_jax.workdir import Workdir


def sections(work: Workdir) -> list[tuple[str, str]]:
    """Returns (title, html) of every study that has results in a run, for the report's page."""
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
