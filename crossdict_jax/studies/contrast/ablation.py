"""Removes directions from a model: what its preference loses, beside controls of equal norm."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.config import Config
from crossdict_jax.models import Site
from crossdict_jax.stats import columns
from crossdict_jax.studies.contrast.preference import Reader

LEVEL = 0.05  # of the share of controls that may cost as much


@dataclass(frozen=True)
class Cut:
    """Directions that are removed from a model together, and others for controls."""

    strength: np.ndarray  # float32 [texts, seq, all]
    vectors: np.ndarray  # float32 [all, d_model], per unit of strength
    n: int  # the first n are removed; the others only serve controls

    @cached_property
    def overlaps(self) -> np.ndarray:
        """float64 [all, all]: inner products of what each adds to the activations, summed."""
        strength = self.strength.reshape(-1, len(self.vectors)).astype(np.float64)
        vectors = self.vectors.astype(np.float64)
        return (strength.T @ strength) * (vectors @ vectors.T)

    def size(self, rows: np.ndarray) -> float:
        """Returns the norm over all tokens of what these vectors add."""
        return float(np.sqrt(max(self.overlaps[np.ix_(rows, rows)].sum(), 0.0)))


def measure(
    reader: Reader, site: Site, cut: Cut, config: Config, *, judged: bool = True
) -> tuple[np.ndarray, dict]:
    """Returns what a cut takes from each pair's preference [pairs], and a result row.

    Controls replace each vector by one of its norm and strength, random ("random") or another
    feature's ("shuffled"), or remove as many other features where they fire, scaled to an equal
    norm ("others"). p is the share of controls, the cut among them, that cost as much. ``moves``
    (null if not ``judged``): the cut surely costs more than each family's mean and than 95 % of
    its members.
    """
    clean = reader.preference
    draws = stats.draw(np.arange(len(clean)), count=config.evaluation.bootstrap, seed=config.seed)
    families = draw_controls(cut, config.contrast.controls, stats.generator(config.seed))
    taken = np.arange(len(cut.vectors)) < cut.n
    itself = np.where(taken[:, None], cut.vectors, 0.0).astype(np.float32)
    vectors = np.concatenate([itself[None], *families.values()])
    drop, *nulls = clean[None] - reader.ablated(site, cut.strength, vectors)
    row = {
        "n_features": cut.n,
        "n_pairs": len(drop),
        **columns("effect", draws.mean(drop)),
        "preference": float(clean.mean()),
        "accuracy": float((clean > 0).mean()),
        "accuracy_ablated": float((clean - drop > 0).mean()),
    }
    specific = [judged or None]
    for family, controls in families.items():
        null, nulls = np.array(nulls[: len(controls)]), nulls[len(controls) :]
        lead = mean = p = None
        if len(null):
            lead, mean = draws.mean(drop - null.mean(0)), float(null.mean())
            p = (1 + int((null.mean(1) >= drop.mean()).sum())) / (1 + len(null))
        row |= {f"effect_{family}": mean, f"p_{family}": p} | columns(f"specific_{family}", lead)
        specific.append(lead and lead.surely_positive and p <= LEVEL)
    return drop, row | {"moves": None if None in specific else all(specific)}


def singles(reader: Reader, site: Site, cut: Cut) -> np.ndarray:
    """Returns what each of the first n vectors costs alone, float64 [n, pairs]."""
    alone = np.eye(cut.n, len(cut.vectors), dtype=np.float32)[:, :, None] * cut.vectors[None]
    return reader.preference[None] - reader.ablated(site, cut.strength, alone)


def draw_controls(cut: Cut, count: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns vectors float32 [count, all, d_model] by family; no "others" where these are few."""
    n, norms = cut.n, np.linalg.norm(cut.vectors, axis=1)
    others = n + np.flatnonzero(norms[n:] > 0)
    firing = [i for i in others if cut.size(np.array([i])) > 0]
    random, shuffled, elsewhere = (
        np.zeros((count if possible else 0, *cut.vectors.shape), np.float32)
        for possible in (True, len(others) > 1, len(firing) > 1)
    )

    def with_norms(directions: np.ndarray) -> np.ndarray:
        return directions * (norms[:n] / np.linalg.norm(directions, axis=-1))[..., None]

    random[:, :n] = with_norms(generator.standard_normal((count, n, cut.vectors.shape[1])))
    for row in shuffled:
        row[:n] = with_norms(cut.vectors[generator.choice(others, n, replace=n > len(others))])
    size = cut.size(np.arange(n))
    for row in elsewhere:
        drawn = generator.choice(firing, min(n, len(firing)), replace=False)
        row[drawn] = cut.vectors[drawn] * (size / max(cut.size(drawn), 1e-30))
    return {"random": random, "shuffled": shuffled, "others": elsewhere}
