"""G9: trained models share context, an untrained one shares nothing beyond the token."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax import models
from crossdict_jax.activations.store import open_store
from crossdict_jax.verify import lab, real
from crossdict_jax.verify.gate import Gate, at_least, at_most, shown

DOCUMENTS = 120  # about 17,000 training rows


def gate(*, seed: int, directory: Path) -> Gate:
    one, other = models.EMBEDDED
    untrained = _untrained(other, directory / f"untrained-{Path(other).name}", seed)
    config = real.real_config(
        (one, other, untrained), documents=DOCUMENTS, kinds=("ridge",), seed=seed
    )
    work = real.extracted(config, directory / "run")
    store = open_store(work.activations)
    a, b, new = store.models

    def score(source: str, target: str, kind: str = "ridge") -> dict:
        return lab.closed_form(kind, store, work, source, target, real.SITE)

    def best(source: str, target: str) -> float:
        return score(source, target, "token_ridge")["context_gain"]

    forth, back, control, reverse = score(a, b), score(b, a), score(a, new), score(new, a)
    return Gate(
        "G9",
        "context gain of ridge on activations: trained models share it, an untrained one does not",
        (
            at_least(f"context gain {a} to {b}", forth["context_gain"], 0.2),
            at_least(f"context gain {b} to {a}", back["context_gain"], 0.2),
            at_most(f"context gain {a} to untrained {b}", control["context_gain"], 0.05),
            shown(f"context gain untrained {b} to {a}", reverse["context_gain"]),
            shown(f"context gain of token_ridge {a} to {b}", best(a, b)),
            shown(f"context gain of token_ridge {a} to untrained {b}", best(a, new)),
            shown(f"plain R² {a} to {b}", forth["r2"]),
            shown(f"plain R² {a} to untrained {b}", control["r2"]),
        ),
        note=f"{forth['n_rows']} held-out rows at {real.SITE}, the same ones for all",
    )


def _untrained(name: str, folder: Path, seed: int) -> str:
    """Writes the model with its weights drawn anew and returns its folder."""
    lm = models.load(name)
    models.save(models.init(lm.config, seed=seed), folder, tokenizer=lm.tokenizer)
    return str(folder)
