"""G9: trained models share context, an untrained one shares nothing beyond the token."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax import models
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import to_dict
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check, Gate
from crossdict_jax.workdir import open_workdir

DOCUMENTS = 120  # about 17,000 training rows


def gate(*, seed: int, directory: Path) -> Gate:
    first, second = models.EMBEDDED
    untrained = directory / f"untrained-{Path(second).name}"
    lm = models.load(second)
    models.save(models.init(lm.config, seed=seed), untrained, tokenizer=lm.tokenizer)
    names = (first, second, str(untrained))
    config = lab.lm_config(names, documents=DOCUMENTS, kinds=("ridge",), seed=seed)
    work = open_workdir(directory / "run", to_dict(config))
    store = extract(config, work)
    a, b, new = store.models

    def score(source: str, target: str, kind: str = "ridge") -> dict:
        return lab.activation_scores(kind, store, work, source, target)

    forth, back, control, reverse = score(a, b), score(b, a), score(a, new), score(new, a)
    tables = {target: score(a, target, "token_ridge")["context_gain"] for target in (b, new)}
    return Gate(
        "G9",
        "context gain of ridge on activations: trained models share it, an untrained one does not",
        (
            Check(f"context gain {a} to {b}", forth["context_gain"], ">=", 0.2),
            Check(f"context gain {b} to {a}", back["context_gain"], ">=", 0.2),
            Check(f"context gain {a} to untrained {b}", control["context_gain"], "<=", 0.05),
            Check(f"context gain untrained {b} to {a}", reverse["context_gain"]),
            Check(f"context gain of token_ridge {a} to {b}", tables[b]),
            Check(f"context gain of token_ridge {a} to untrained {b}", tables[new]),
            Check(f"plain R² {a} to {b}", forth["r2"]),
            Check(f"plain R² {a} to untrained {b}", control["r2"]),
        ),
        note=f"{forth['n_rows']} held-out rows at {lab.LM_SITE}, the same ones for all",
    )
