"""A feature of A: named by its number or found by a text, and what it promotes."""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.activations.pairing import normalize
from crossdict_jax.activations.passages import Contexts
from crossdict_jax.causal import effects
from crossdict_jax.causal.directions import MapGroup, strengths
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError

CANDIDATES = 8  # listed by a search
LEAST_FIRINGS = 4  # rows, for a feature to be judged


@dataclass(frozen=True)
class Source:
    """A at a site, with the rows and text on which its features are looked at."""

    run: FinishedRun
    group: MapGroup
    words: Translation

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts(self.run.store, self.group.source, self.words.pieces_a)

    @property
    def dose(self) -> float:
        """The middle dose, at which promotion is measured."""
        return statistics.median_high(map(abs, self.run.config.steer.alphas))


@dataclass(frozen=True)
class Feature:
    """A feature of A that is added to B."""

    id: int
    strength: np.ndarray  # float32 [n], activations on training rows
    direction: np.ndarray  # float32 [d_a], per unit of activation
    median_norm: float  # of A's activations where it was measured
    promoted: dict[int, float]  # {token of A: change of its log p, nats}
    mapped: dict[int, float]  # the same in B's tokens
    candidates: list[dict]  # found by the search, this one first; empty without a search


def choose(source: Source) -> Feature:
    """Returns the named feature, or the first that a search finds.

    The tokens that it promotes become likelier when it is added to A, at the middle dose, where it
    fires in held-out text. UserError if it does not exist, or fires nowhere.
    """
    run, group, a = source.run, source.group, source.group.ends[0]
    config, settings, dictionary = run.config, run.config.steer, run.dictionary(*a)
    feature, candidates, site = settings.feature, [], f"{group.source} at {group.site_source}"
    if settings.search:
        candidates = search(source, settings.search)
        feature = candidates[0]["feature"]
    elif feature >= dictionary.width:
        raise UserError(
            f"steer.feature={feature}: {site} has features 0 to {dictionary.width - 1}."
        )
    train, test = run.rows("train"), run.rows("test")
    strength, held_out = (
        strengths(dictionary, run.store.read(*a, rows), np.array([feature]))[:, 0]
        for rows in (train, test)
    )
    for fires, n, kind in ((strength, len(train), "training"), (held_out, len(test), "held-out")):
        if not fires.any():
            raise UserError(
                f"steer.feature={feature}: it fires at none of the {n} {kind} positions of {site} "
                "that are read; choose another, or find one by steer.search."
            )
    generator = stats.generator(config.seed, feature)
    documents, count = run.store.rows.document[test], config.intervention.contexts
    rows = effects.choose_contexts(held_out, documents, count, generator)
    model = run.at_site(*a, test[rows])
    direction = decoder_rows(dictionary, np.array([feature]))[0]
    norm, words = model.median_norm, source.words
    if settings.norm != "residual":
        norm = float(held_out[rows].mean() * np.linalg.norm(direction))
    dose = norm * source.dose * stats.normalised(direction)
    promoted = effects.promoted_tokens(model.hold(size=count, span=1), dose, words.has_text)
    mapped = words.weights_in_b(promoted, below=run.runner(group.target).config.vocab_size)
    return Feature(feature, strength, direction, model.median_norm, promoted, mapped, candidates)


def search(source: Source, text: str) -> list[dict]:
    """Returns the features that fire most around a text in training text.

    First those that raise the text's first token most, at the middle dose, one norm and the same
    held-out positions. UserError if none fires more there than elsewhere.
    """
    run, a, count = source.run, source.group.ends[0], source.run.config.intervention.contexts
    train, test = run.rows("train"), run.rows("test")
    share, base, token = around(text, source.contexts, train, run.codes(*a))
    live = np.any([(f > 0).any(0) for f in run.codes(*a, test)], axis=0) & (share > base)
    ids = np.argsort(np.where(live, -share, 0), kind="stable")[: min(CANDIDATES, live.sum())]
    if not len(ids):
        raise UserError(
            f"steer.search={text!r} finds no feature: none fires around it more than elsewhere; "
            "search for other text."
        )
    drawn = stats.generator(run.config.seed).permutation(test)[:count]
    model = run.at_site(*a, np.sort(drawn))
    directions = stats.normalised(decoder_rows(run.dictionary(*a), ids))
    directions *= model.median_norm * source.dose
    held = model.hold(size=count, span=1)
    change, _ = held.changes(directions, {token: 1.0}, limit=1)
    about = {"base": base, "token": source.words.text("a", token)}
    candidates = [
        {"feature": int(i), "share": float(share[i]), "promotes": float(nats)} | about
        for i, nats in zip(ids, change.mean(1, dtype=np.float64))
    ]
    return sorted(candidates, key=lambda candidate: -candidate["promotes"])


def around(
    text: str, contexts: Contexts, rows: np.ndarray, codes: Iterable[np.ndarray]
) -> tuple[np.ndarray, float, int]:
    """Returns (share, base, token): which features fire around a text.

    share [width]: the share of each feature's summed activation at rows around the text, 0 with
    fewer than LEAST_FIRINGS; base: the share of rows around the text; token: the commonest one in
    which the text begins. UserError if the text is around no row.

    Args:
      rows: int [n], row numbers of the store.
      codes: features [m, width] of these rows, in blocks.
    """
    wanted = normalize(text).encode()
    holds = np.array([wanted in contexts.text(row) for row in rows])
    if not holds.any():
        raise UserError(
            f"steer.search={text!r} stands nowhere in the {len(rows)} training positions read; "
            "search for other text."
        )
    start, sums = 0, 0.0  # sums over rows: activations around the text, all activations, firings
    for f in codes:
        mask = holds[start : start + len(f), None]
        sums += np.stack([(f * mask).sum(0), f.sum(0), (f > 0).sum(0)], dtype=np.float64)
        start += len(f)
    inside, total, firings = sums
    share = np.where(firings >= LEAST_FIRINGS, inside / np.maximum(total, 1e-30), 0.0)
    tokens = Counter(t for row in rows[holds] for t in contexts.first_tokens(wanted, row))
    return share, float(holds.mean()), tokens.most_common(1)[0][0]
