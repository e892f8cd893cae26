"""The page of a run: one html file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.config import Config
from crossdict_jax.report import answer, causal, inputs, shared, transfer
from crossdict_jax.report.blocks import template
from crossdict_jax.report.results import read_run
from crossdict_jax.workdir import Workdir, write_text

STYLE = Path(__file__).with_name("style.css")


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
    run = read_run(work)
    stages = [
        inputs.run_section(config, run, work.root),
        inputs.pairing_section(run),
        inputs.dictionaries_section(run),
        transfer.transfer_section(run),
        transfer.features_section(run),
        transfer.controls_section(run),
        shared.matching_section(run),
        shared.layers_section(run),
        causal.stitching_section(run),
        causal.feature_causal_section(run),
        shared.crosscoder_section(run),
    ]
    closing = [inputs.training_section(run), inputs.time_section(run), inputs.words_section(run)]
    closing += inputs.closing_sections(config)
    studies = [(re.sub(r"[^a-z0-9]+", "-", t.lower()).strip("-"), t, html) for t, html in sections]
    before, after = ([(s.id, s.title, s.html) for s in x if s.blocks] for x in (stages, closing))
    html = template("page.html.j2").render(
        style=STYLE.read_text(encoding="utf-8"),
        name=work.root.resolve().name,
        models=answer.names(run.models),
        question=answer.question(run.models),
        answer=answer.answer(run),
        cautions=answer.cautions(run),
        sections=[*before, *studies, *after],
    )
    path = work.report / "index.html"
    write_text(path, html)
    return path
