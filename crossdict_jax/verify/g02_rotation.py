"""G2: a rotated copy in another width, its features permuted, is found again by what finds it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, maps, modules, stats
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.dictionaries.train import train_dictionaries
from crossdict_jax.evaluation import transfer_metrics
from crossdict_jax.evaluation.matching import match
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, best_cosines, views
from crossdict_jax.workdir import Workdir

PLANTED = PlantedConfig(rows=12_000, documents=120, features=96, widths=(48,), exclusive=0.0)
COPY = 64  # dimensions of the copy
SAE = SAEConfig(width=128, k=6, steps=600, batch_size=512)
MINIMUM_FIRINGS = 30  # active test rows, for a feature to count


def gate(*, seed: int, directory: Path) -> list[Check]:
    rng = stats.generator(seed)
    planted, (a, b) = views(PLANTED, seed), lab.NAMES
    config = replace(lab.planted_config(seed, ["procrustes"]), sae=SAE)
    work = Workdir(directory / "one")
    train_dictionaries(config, lab.save_store(planted, work), work)
    dictionary = dictionaries.load(work.dictionary(a, lab.SITE))

    Q = np.linalg.qr(rng.standard_normal((COPY, PLANTED.widths[0])))[0].T
    offset, order = rng.standard_normal(COPY), rng.permutation(dictionary.width)
    copy = (planted.x[0] @ Q + offset[None, :]).astype(np.float32)
    # The dictionary of the copy; its feature i is feature order[i].
    of = {name: np.asarray(array) for name, array in modules.split(dictionary)[1].items()}
    arrays = {"W_enc": (Q.T @ of["W_enc"])[:, order], "b_enc": of["b_enc"][order]}
    arrays |= {"W_dec": (of["W_dec"] @ Q)[order], "b_dec": of["b_dec"] @ Q + of["scale"] * offset}
    of_copy = from_arrays(find("topk"), of | arrays, k=dictionary.k)
    both = replace(planted, x=(planted.x[0], copy), tokens=planted.tokens * 2)
    work = Workdir(directory / "two")
    store = lab.save_store(both, work, [dictionary, of_copy])
    maps.fit_maps(config, store, work)

    train, test = (
        maps.load_pairs(store, b, a, lab.SITE, lab.SITE, split, work) for split in ("train", "test")
    )
    train_mean = np.asarray(train.target.x, np.float32).mean(0)
    m = maps.load(work.map(b, a, lab.SITE, lab.SITE, "procrustes"))
    x, translated = np.asarray(test.target.x, np.float32), maps.predict_activations(m, test)
    itself, moved = (
        transfer_metrics(dictionary(rows), x, train_mean=train_mean, bootstrap=0)["r2"]
        for rows in (x, translated)
    )
    pairs = match(test.source.codes, test.target.codes, minimum_firings=MINIMUM_FIRINGS)
    right = (order[pairs.features_a] == pairs.features_b).sum() / max(pairs.live_a, 1)
    # Baseline without a map: the nearest decoder row, zeros appended.
    decoders = [np.asarray(s.dictionary.W_dec[...]) for s in (test.source, test.target)]
    padded = np.pad(decoders[1], ((0, 0), (0, COPY - PLANTED.widths[0])))
    direct = (best_cosines(padded, decoders[0])[1] == order).mean()
    return [
        Check("variance explained of its own rows", itself),
        Check("share of it after Procrustes from the copy", moved / itself, ">=", 0.999),
        Check("live features", pairs.live_a, ">=", 50),
        Check("share of the planted permutation that matching recovers", float(right), ">=", 0.99),
        Check("share that direct cosines of decoders recover", float(direct), "<=", 0.1),
    ]
