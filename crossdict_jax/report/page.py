"""The page of a run: one html file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.config import Config
from crossdict_jax.report import answer, causal, inputs, shared, transfer
from crossdict_jax.report.html import SHARED, fill
from crossdict_jax.report.results import Run, read_run
from crossdict_jax.workdir import Workdir, write_text


def write_report(config: Config, work: Workdir, sections: Sequence[tuple[str, str]] = ()) -> Path:
    """Writes ``report/index.html``, complete in itself, and returns its path.

    Args:
      config: the settings of the run.
      work: its directory; needs results/{pairing.json, reconstruction.jsonl, transfer.jsonl},
        shows what else is there.
      sections: (title, html) of what others have to say of the run: its studies.

    Raises:
      UserError: a needed file is missing (the stage to run is named) or any file is damaged.
    """
    page = work.report / "index.html"
    write_text(page, render(config, read_run(work), root=work.root, sections=sections))
    return page


def render(
    config: Config, run: Run, *, root: Path, sections: Sequence[tuple[str, str]] = ()
) -> str:
    """Returns the html of the run in the folder ``root``."""
    rows = run.rows
    stages = [
        inputs.run_section(config, run, root),
        inputs.pairing_section(run),
        inputs.dictionaries_section(run),
        transfer.transfer_section(run),
        transfer.features_section(run),
        transfer.controls_section(run),
        shared.matching_section(run),
        shared.layers_section(run),
        causal.stitching_section(run),
        causal.feature_causal_section(rows["feature_causal"], rows["feature_causal_summary"]),
        *([shared.crosscoder_section(rows["crosscoder"])] if rows["crosscoder"] else []),
    ]
    closing = [inputs.training_section(run), inputs.time_section(run), inputs.words_section(run)]
    closing += inputs.closing_sections(config)
    parts = [{"id": s.id, "title": s.title, "html": s.html} for s in stages]
    for title, html in sections:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        parts.append({"id": name, "title": title, "html": html})
    parts += [{"id": s.id, "title": s.title, "html": s.html} for s in closing]
    return fill(
        SHARED / "page.html.j2",
        style=(SHARED / "style.css").read_text(encoding="utf-8"),
        name=root.resolve().name,
        models=answer.names(run.models),
        question=answer.question(run.models),
        answer=[
            *answer.answer(run),
            *causal.answer(rows["feature_causal_summary"]),
            *shared.answer(run),
        ],
        cautions=answer.cautions(run),
        sections=parts,
    )
