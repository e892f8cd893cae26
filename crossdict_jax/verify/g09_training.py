"""G9: trained models share context, an untrained one shares nothing beyond the token."""

from pathlib import Path

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.extract import extract
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.workdir import Workdir

DOCUMENTS = 120  # about 17,000 training rows


def gate(*, seed: int, directory: Path) -> list[Check]:
    first, second = models.EMBEDDED
    untrained = directory / f"untrained-{Path(second).name}"
    lm = models.load(second)
    models.save(models.init(lm.config, seed=seed), untrained, tokenizer=lm.tokenizer)
    names = (first, second, str(untrained))
    config = lab.lm_config(names, documents=DOCUMENTS, seed=seed)
    work = Workdir(directory / "run")
    store = extract(config, work)
    a, b, new = store.models
    for name in store.models:
        dictionaries.save(lab.positive(store.d_model(name)), work.dictionary(name, lab.LM_SITE))
    directions = ((a, b), (b, a), (a, new))
    forth, back, control = (lab.activation_scores(store, work, *d) for d in directions)
    return [
        Check(f"context gain {a} to {b}", forth["context_gain"], ">=", 0.2),
        Check(f"context gain {b} to {a}", back["context_gain"], ">=", 0.2),
        Check(f"context gain {a} to untrained {b}", control["context_gain"], "<=", 0.05),
        Check(f"plain R² {a} to {b}", forth["r2"]),
        Check(f"plain R² {a} to untrained {b}", control["r2"]),
    ]
