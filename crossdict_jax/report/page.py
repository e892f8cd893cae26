"""The page of a run: one html file that needs no other."""

import re
from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.config import Config
from crossdict_jax.report import answer, causal, inputs, shared, transfer
from crossdict_jax.report.blocks import Details, Facts, html, template
from crossdict_jax.report.results import read_run
from crossdict_jax.training.stage import outdated
from crossdict_jax.workdir import Workdir, write_text

STYLE = Path(__file__).with_name("style.css")


def write_report(config: Config, work: Workdir, sections: Sequence[tuple[str, str]] = ()) -> Path:
    """Writes ``report/index.html`` with the studies' (title, html) and returns its path.

    Needs results/{pairing.json, reconstruction.jsonl, transfer.jsonl} and shows what else is there.

    Raises:
      UserError: a needed file is missing (the stage to run is named) or any file is damaged.
    """
    run = read_run(work)
    results = {
        "What was run": inputs.run_section(config, run, work.root),
        "Pairing": inputs.pairing_section(run),
        "Dictionaries": inputs.dictionaries_section(run),
        "Transfer": transfer.transfer_section(run),
        "Single features": transfer.features_section(run),
        "Controls": transfer.controls_section(run),
        "Shared features": shared.matching_section(run),
        "Layers": shared.layers_section(run),
        "Stitching": causal.stitching_section(run),
        "Features put to work": causal.feature_causal_section(run),
        "Joint codes": shared.crosscoder_section(run),
    }
    closing = {
        "Training": inputs.training_section(run),
        "Time": inputs.time_section(run),
        "Words": inputs.words_section(run),
        "Limits": inputs.LIMITS,
        "Settings": [Details("All settings of the run", [Facts(inputs.settings(config))])],
    }
    before, after = (
        [(t, text) for t, b in x.items() if (text := html(b))] for x in (results, closing)
    )
    *first, last = run.models
    text = template("page.html.j2").render(
        style=STYLE.read_text(encoding="utf-8"),
        name=work.root.resolve().name,
        models=f"{', '.join(first)} and {last}" if first else last,
        answer=answer.answer(run),
        cautions=[*answer.cautions(run, config), *outdated(work)],
        sections=[
            (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), title, part)
            for title, part in (*before, *sections, *after)
        ],
    )
    path = work.report / "index.html"
    write_text(path, text)
    return path
