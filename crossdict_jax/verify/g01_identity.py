"""G1: a model against itself is itself: pairs, activations, features, matches."""

from pathlib import Path

from crossdict_jax import maps, models
from crossdict_jax.activations.extract import extract
from crossdict_jax.dictionaries.train import train_dictionaries
from crossdict_jax.evaluation.matching import match
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.workdir import Workdir, read_json

DOCUMENTS = 60
MINIMUM_FIRINGS = 30  # active test rows, for a feature to count


def gate(*, seed: int, directory: Path) -> list[Check]:
    name = models.EMBEDDED[0]
    config = lab.lm_config((name, name), documents=DOCUMENTS, seed=seed)
    work = Workdir(directory)
    store = extract(config, work)
    train_dictionaries(config, store, work)
    rows = lab.transfer_rows(config, store, work)
    a, b = store.models
    ridge = lab.pick(rows, "ridge", source=a)
    test = maps.load_pairs(store, a, b, lab.LM_SITE, lab.LM_SITE, "test", work)
    codes = (side.codes for side in (test.source, test.target))
    matched = match(*codes, minimum_firings=MINIMUM_FIRINGS, merge_duplicates=True)
    coverage = [m["coverage"] for m in read_json(work.result("pairing.json"))["models"].values()]
    activations = lab.activation_scores(store, work, a, b)
    return [
        Check("coverage of the pairing, the lower one", min(coverage), "==", 1.0),
        Check("FVU of ridge on activations", activations["fvu"], "<=", 1e-4),
        Check("top-1 of ridge", ridge["top1"], "==", 1.0),
        Check("live features", matched.live_a, ">=", 50),
        Check("matched less live features", len(matched.r) - matched.live_a, "==", 0),
        Check("correlation of the worst match", matched.r.min(initial=1.0), ">=", 0.999),
    ]
