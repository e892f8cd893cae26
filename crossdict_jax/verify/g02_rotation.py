"""G2: a rotated copy in another width, its features permuted, is found again by what finds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, maps, modules
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.evaluation import transfer_metrics
from crossdict_jax.evaluation.matching import match
from crossdict_jax.maps import Pairs
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Gate, at_least, at_most, shown
from crossdict_jax.verify.planted import PlantedConfig, Views, views
from crossdict_jax.workdir import Workdir

PLANTED = PlantedConfig(rows=12_000, documents=120, features=96, widths=(48,), exclusive=0.0)
COPY = 64  # dimensions of the copy
SAE = SAEConfig(width=128, k=6, steps=600, batch_size=512)
MINIMUM_FIRINGS = 30  # test rows in which a feature must be active to count


def gate(*, seed: int, directory: Path) -> Gate:
    rng = np.random.Generator(np.random.Philox(key=seed))
    original = views(PLANTED, seed)
    own = _trained(original, seed, directory / "one")
    Q = np.linalg.qr(rng.standard_normal((COPY, PLANTED.widths[0])))[0].T
    offset, order = rng.standard_normal(COPY), rng.permutation(own.width)
    copy = (original.x[0] @ Q + offset[None, :]).astype(np.float32)
    both = replace(original, x=(original.x[0], copy), tokens=original.tokens * 2)
    work = Workdir(directory / "two")
    store = lab.write_store(both, work.activations)
    lab.save_dictionaries([own, _moved(own, Q, offset, order)], work)
    config = lab.planted_config(kinds=("procrustes",), seed=seed)
    maps.fit_maps(config, store, work)
    test = _pairs(work, "test")
    train_mean = np.asarray(_pairs(work, "train").target.x, np.float32).mean(0)
    itself, moved = _explained(test, work, train_mean)
    right, live = _matched(test, order)
    return Gate(
        "G2",
        f"a rotated, shifted copy in {COPY} in place of {PLANTED.widths[0]} dimensions",
        (
            shown("variance explained of its own rows", itself),
            at_least("share of it after Procrustes from the copy", moved / itself, 0.999),
            at_least("live features", live, 50),
            at_least("share of the planted permutation that matching recovers", right, 0.99),
            at_most("share that direct cosines of decoders recover", _direct(test, order), 0.1),
        ),
    )


def _trained(one: Views, seed: int, directory: Path) -> Dictionary:
    """Returns a dictionary trained on the original rows."""
    work = Workdir(directory)
    store = lab.write_store(one, work.activations)
    config = lab.planted_config(seed=seed)
    config.sae = SAE
    dictionaries.train_dictionaries(config, store, work)
    return dictionaries.load(work.dictionary(lab.NAMES[0], lab.SITE))


def _moved(d: Dictionary, Q: np.ndarray, offset: np.ndarray, order: np.ndarray) -> Dictionary:
    """Returns the dictionary of ``x Q + offset`` whose feature i is feature ``order[i]`` of d."""
    of = {name: np.asarray(array) for name, array in modules.split(d)[1].items()}
    arrays = {
        "W_enc": (Q.T @ of["W_enc"])[:, order],
        "b_enc": of["b_enc"][order],
        "W_dec": (of["W_dec"] @ Q)[order],
        "b_dec": of["b_dec"] @ Q + of["scale"] * offset,
        "scale": of["scale"],
    }
    return from_arrays(find("topk"), arrays, k=d.k)


def _pairs(work: Workdir, split: str) -> Pairs:
    """Returns paired rows from the copy to the original."""
    a, b = lab.NAMES[:2]
    store = open_store(work.activations)
    return maps.load_pairs(store, b, a, lab.SITE, lab.SITE, split, work)


def _explained(test: Pairs, work: Workdir, train_mean: np.ndarray) -> tuple[float, float]:
    """Returns what the original's dictionary explains of its rows, and of them as translated."""
    a, b = lab.NAMES[:2]
    m = maps.load(work.map(b, a, lab.SITE, lab.SITE, "procrustes"))
    x, d = np.asarray(test.target.x, np.float32), test.target.dictionary
    inputs = (x, maps.predict_activations(m, test))
    return tuple(
        transfer_metrics(d(rows), x, train_mean=train_mean, bootstrap=0)["r2"] for rows in inputs
    )


def _matched(test: Pairs, order: np.ndarray) -> tuple[float, int]:
    """Returns (share of the live features that are matched with what they are, live features)."""
    found = match(
        lab.features(test.source), lab.features(test.target), minimum_firings=MINIMUM_FIRINGS
    )
    right = order[found.features_a] == found.features_b
    return float(right.sum() / max(found.live_a, 1)), found.live_a


def _direct(test: Pairs, order: np.ndarray) -> float:
    """Returns the share of features whose nearest decoder row, zeros appended, is the right one."""
    copy, own = (np.asarray(s.dictionary.W_dec[...]) for s in (test.source, test.target))
    own = np.pad(own, ((0, 0), (0, copy.shape[1] - own.shape[1])))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (copy, own)]
    return float(((unit[0] @ unit[1].T).argmax(1) == order).mean())
