"""Questions asked of a finished run; nothing below knows them.

A study is a folder here, and no list holds its name. Its package describes its result files
(``TABLE``) and gives ``TITLE`` and ``section(rows) -> html`` for the report; its
``measure.run(config, work)`` measures, writes the file and prints a table.
"""

from __future__ import annotations

import importlib
import pkgutil

from crossdict_jax import results
from crossdict_jax.workdir import Workdir


def sections(work: Workdir) -> list[tuple[str, str]]:
    """Returns (title, html) of every study that has results in a run, for the report's page.

    Raises:
      UserError: a result file is damaged.
    """
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
