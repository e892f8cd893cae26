"""Studies: questions asked of a finished run, a folder each.

A study has ``TABLE`` (its result file), ``TITLE``, ``section(rows) -> html`` and ``measure.run``.
"""

import importlib
import pkgutil
from types import ModuleType

from crossdict_jax import results
from crossdict_jax.workdir import Workdir


def every() -> list[ModuleType]:
    """Returns the folders of all studies, imported: each has described its result files."""
    folders = (module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return [importlib.import_module(f"{__name__}.{name}") for name in folders]


def sections(work: Workdir) -> list[tuple[str, str]]:
    """Returns (title, html) of every study that has results."""
    shown = []
    for study in every():
        tables = [table for table in vars(study).values() if isinstance(table, results.Table)]
        files = sorted(file for table in tables for file in work.results.glob(table.file))
        rows = [
            row for file in files for row in results.read(work, str(file.relative_to(work.results)))
        ]
        if rows:
            shown.append((study.TITLE, study.section(rows)))
    return shown
