"""What a language model prefers of two texts, and what taking out directions costs of that."""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import stats
from crossdict_jax.causal.directions import strengths
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner, pad, token_losses
from crossdict_jax.stats import columns
from crossdict_jax.studies.contrast import JUDGED
from crossdict_jax.studies.contrast.sets import ContrastSet
from crossdict_jax.studies.reading import Reading, read_texts

SEQ_STEP = 8  # lengths are rounded up: few programs for many sets
AT_ONCE = 16  # draws, and features of a draw, are padded to a multiple: one program for all
LEVEL = 0.05  # of the share of controls that may cost as much
STEPS = 8  # of integrated gradients; 1 would be gradient times activation


def read_pairs(run: FinishedRun, pairs: ContrastSet) -> tuple[Reading, int]:
    """Returns what all models read (texts 2i and 2i + 1 are a pair), and how many pairs are nested.

    A nested pair is left out: one text begins the other, so it cannot be less likely.
    """
    texts = [text for both in zip(pairs.good, pairs.bad) for text in both]
    reading = read_texts(run, texts, group=2)
    nested = np.zeros(len(reading.kept) // 2, bool)
    for passages in reading.passages.values():
        for i, (a, b) in enumerate(zip(passages.tokens[::2], passages.tokens[1::2])):
            n = min(len(a), len(b))
            nested[i] |= (a[:n] == b[:n]).all()
    return reading.take(np.flatnonzero(np.repeat(~nested, 2))), int(nested.sum())


class Reader:
    """A language model and pairs of texts: 2i is the good text of pair i, 2i + 1 the bad.

    Attributes:
      tokens: int32 [texts, seq], padded at the end.
      scored: bool [texts, seq], whose log-probability counts: from the first token that differs in
        a pair, but not a text's first.
      edited: bool [texts, seq], where features are read and ablated.
      x: of a site, the activations, float32 [texts, seq, d_model].
    """

    def __init__(self, runner: Runner, passages: Passages):
        self.runner, self.passages, texts = runner, passages, passages.tokens
        seq = math.ceil(max(map(len, texts)) / SEQ_STEP) * SEQ_STEP
        self.tokens = pad(texts, (len(texts), min(seq, runner.config.context)))
        self._source = passages.sources(np.arange(len(texts)), self.tokens.shape)
        self.edited, self.scored = self._source >= 0, np.zeros(self.tokens.shape, bool)
        for i, text in enumerate(texts):
            other = texts[i ^ 1][: len(text)]
            differs = int(np.argmax(text[: len(other)] != other))
            self.scored[i, max(differs, 1) : len(text)] = True
        self.x = cache(lambda site: runner.read(self.tokens, [site])[site])

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns values [rows, n] at the rows' edited tokens, [texts, seq, n]; else 0."""
        dense = np.zeros((*self.tokens.shape, values.shape[1]), values.dtype)
        dense[self.edited] = values[self._source[self.edited]]
        return dense

    def strength(self, site: Site, dictionary: Dictionary, features: np.ndarray) -> np.ndarray:
        """Returns features at the edited tokens, float32 [texts, seq, features]."""
        dense = np.zeros((*self.edited.shape, len(features)), np.float32)
        dense[self.edited] = strengths(dictionary, self.x(site)[self.edited], features)
        return dense

    @cached_property
    def preference(self) -> np.ndarray:
        """log p(good) - log p(bad) in nats, float64 [pairs]."""
        return self.runner.run(_prefers, self.tokens, self.scored, group=2).astype(np.float64)

    def ablated(self, site: Site, strength: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Returns the preference without the directions of each draw, float64 [draws, pairs].

        Vectors are [draws, features, d_model], times strength [texts, seq, features].
        """
        count, rest = len(vectors), -vectors.shape[1] % AT_ONCE
        vectors = np.pad(vectors.astype(np.float32), ((0, -count % AT_ONCE), (0, rest), (0, 0)))
        strength = np.pad(strength, ((0, 0), (0, 0), (0, rest)))
        arrays = self.tokens, self.scored, self.x(site), strength
        parts = [
            self.runner.run(_ablated, *arrays, static=(site,), shared=(some,), group=2)
            for some in np.split(vectors, len(vectors) // AT_ONCE)
        ]
        return np.concatenate(parts, axis=1)[:, :count].T.astype(np.float64)

    def attribution(self, site: Site, dictionary: Dictionary) -> np.ndarray:
        """Returns what each feature adds to the preference in nats, float32 [pairs, width].

        Integrated gradient of the preference, from no feature to x_hat, times the feature, summed
        over both texts; x - x_hat is kept (Marks et al. 2024, arXiv 2403.19647, section 3).
        """
        arrays = self.tokens, self.scored, self.edited, self.x(site)
        settings = {"static": (site,), "shared": (dictionary,), "group": 2}
        return self.runner.run(_attribution, *arrays, **settings)


def _prefers(lm, tokens, scored, site=None, x=None) -> jax.Array:
    """The preference [pairs], with x [texts, seq, d_model] in place of a site's activations."""
    losses = token_losses(lm, tokens, lambda at, y: x if at == site else y)
    of_texts = jnp.sum(jnp.where(scored[:, 1:], losses, 0.0), axis=1)
    return of_texts[1::2] - of_texts[::2]


def _ablated(lm, site, vectors, tokens, scored, x, strength) -> jax.Array:
    """The preference without the directions of each draw, [pairs, draws]."""

    def without(directions):  # [features, d_model]
        taken = jnp.einsum("tsf,fd->tsd", strength, directions, precision="highest")
        return _prefers(lm, tokens, scored, site, x - taken)

    return jax.lax.map(without, vectors).T


def _attribution(lm, site, dictionary, tokens, scored, edited, x) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    f = dictionary.encode(rows)
    error, edited = rows - dictionary.decode(f), edited.reshape(-1)[:, None]

    def total(f):
        y = jnp.where(edited, dictionary.decode(f) + error, rows).reshape(x.shape)
        return _prefers(lm, tokens, scored, site, y).sum()

    def add(sums, alpha):
        return sums + jax.grad(total)(alpha * f), None

    alphas = jnp.arange(1, STEPS + 1, dtype=jnp.float32) / STEPS
    sums, _ = jax.lax.scan(add, jnp.zeros_like(f), alphas)
    shares = jnp.where(edited, f * sums / STEPS, 0.0)
    return shares.reshape(len(x) // 2, -1, f.shape[-1]).sum(axis=1)  # both texts of a pair


@dataclass(frozen=True)
class Cut:
    """Directions that are removed from a model together, and others for controls."""

    strength: np.ndarray  # float32 [texts, seq, all]
    vectors: np.ndarray  # float32 [all, d_model], per unit of strength
    n: int  # the first n are removed; the others only serve controls


def ablate(
    reader: Reader, site: Site, cut: Cut, config: Config, *, judged: bool = True
) -> tuple[np.ndarray, dict]:
    """Returns what a cut takes from each pair's preference [pairs], and a result row.

    Controls replace each vector by one of its norm and strength, random ("random") or another
    feature's ("shuffled"), or remove as many other features where they fire, scaled to an equal
    norm ("others"). p is the share of controls, the cut among them, that cost as much. ``moves``
    (null if not ``judged``, or of fewer than JUDGED pairs): the cut surely costs more than each
    family's mean and than 95 % of its members.
    """
    clean = reader.preference
    draws = stats.draw(np.arange(len(clean)), count=config.evaluation.bootstrap, seed=config.seed)
    families = draw_controls(cut, config.contrast.controls, stats.generator(config.seed))
    itself = np.array(cut.vectors, np.float32)
    itself[cut.n :] = 0.0
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
    specific = [(judged and len(drop) >= JUDGED) or None]
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
    # Inner products [all, all] of what each vector adds to the activations, over all tokens.
    strength = cut.strength.reshape(-1, len(cut.vectors)).astype(np.float64)
    vectors = cut.vectors.astype(np.float64)
    overlaps = (strength.T @ strength) * (vectors @ vectors.T)

    def size(rows: np.ndarray) -> float:
        """The norm over all tokens of what these vectors add."""
        return float(np.sqrt(max(overlaps[np.ix_(rows, rows)].sum(), 0.0)))

    firing = [i for i in others if overlaps[i, i] > 0]
    different = math.comb(len(firing), min(n, len(firing)))  # draws of them
    random, shuffled, elsewhere = (
        np.zeros((count if possible else 0, *cut.vectors.shape), np.float32)
        for possible in (True, len(others) > 1, different >= count)
    )

    def with_norms(directions: np.ndarray) -> np.ndarray:
        return directions * (norms[:n] / np.linalg.norm(directions, axis=-1))[..., None]

    random[:, :n] = with_norms(generator.standard_normal((count, n, cut.vectors.shape[1])))
    for row in shuffled:
        row[:n] = with_norms(cut.vectors[generator.choice(others, n, replace=n > len(others))])
    whole = size(np.arange(n))
    for row in elsewhere:
        drawn = generator.choice(firing, min(n, len(firing)), replace=False)
        row[drawn] = cut.vectors[drawn] * (whole / max(size(drawn), 1e-30))
    return {"random": random, "shuffled": shuffled, "others": elsewhere}
