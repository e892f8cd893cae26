"""A feature of A: named by its number or found by a text, and what it promotes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.activations.passages import Contexts
from crossdict_jax.causal import effects
from crossdict_jax.causal.directions import MapGroup, strengths
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError

CANDIDATES = 8  # features that a search lists
LEAST_FIRINGS = 4  # rows, for a feature to be judged at all


@dataclass(frozen=True)
class Source:
    """A at a site, and how its features are looked at: on rows of the store, in words."""

    run: FinishedRun
    group: MapGroup
    words: Translation

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts(self.run.store, self.group.source, self.words.pieces_a)

    @property
    def dose(self) -> float:
        """The middle dose, at which what a feature promotes is measured."""
        doses = sorted(map(abs, self.run.config.steer.alphas))
        return doses[len(doses) // 2]


@dataclass(frozen=True)
class Feature:
    """A feature of A that is put into B."""

    id: int
    strength: np.ndarray  # float32 [n], its activations on the training rows
    direction: np.ndarray  # float32 [d_a], what a unit of it adds to A
    median_norm: float  # of A's activations where it was measured
    promoted: dict[int, float]  # {token of A: change of its log p, nats}
    mapped: dict[int, float]  # the same in B's tokens
    candidates: list[dict]  # all that the search found, this one first; empty without a search


def choose(source: Source) -> Feature:
    """Returns the feature that was named, or the first of those that a search finds.

    It is added to A at the middle dose where it fires in held-out text: the tokens that become
    likelier are what it promotes. UserError if it does not exist, or fires nowhere.
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
                f"steer.feature={feature}: feature {feature} of {site} fires at none of the {n} "
                f"{kind} positions read, so nobody can say what it promotes; choose another, or "
                "find one by steer.search."
            )
    generator = stats.generator(config.seed, feature)
    documents, count = run.store.rows.document[test], config.intervention.contexts
    rows = effects.choose_contexts(held_out, documents, count, generator)
    model = run.at_site(*a, test[rows])
    direction = decoder_rows(dictionary, np.array([feature]))[0]
    added = float(held_out[rows].mean() * np.linalg.norm(direction))
    norm, _ = effects.dose_norms(settings.norm, (model.median_norm,) * 2, added, added)
    dose = norm * source.dose * effects.normalised(direction)
    held, words = model.hold(size=count, span=1), source.words
    promoted = effects.promoted_tokens(held, dose, words.has_text)
    mapped = words.weights_in_b(promoted, below=run.runner(group.target).config.vocab_size)
    return Feature(feature, strength, direction, model.median_norm, promoted, mapped, candidates)


def search(source: Source, text: str) -> list[dict]:
    """Returns the features that fire most around a text in training text, by what they promote.

    First comes who makes the text's first token likelier than the others do, at one norm, the
    middle dose, and the same held-out positions. UserError if none fires there more than anywhere.
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
    directions = effects.normalised(decoder_rows(run.dictionary(*a), ids))
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
    """Returns which features fire around a text: (share, base, token).

    share [width]: of each feature's activation over all rows, how much is at those with the text
    around them, 0 of one that fires at less than LEAST_FIRINGS; base: their share of the rows;
    token: the commonest one in which the text begins. UserError if it stands around no row.

    Args:
      rows: int [n], row numbers of the store.
      codes: the features [m, width] of these rows, in blocks.
    """
    wanted = text.encode()
    holds = np.array([wanted in contexts.text(row) for row in rows])
    if not holds.any():
        raise UserError(
            f"steer.search={text!r} stands nowhere in the {len(rows)} training positions read; "
            "search for other text."
        )
    start, sums = 0, 0.0  # over rows: of activations around the text, of all, and of firings
    for f in codes:
        mask = holds[start : start + len(f), None]
        sums += np.stack([(f * mask).sum(0), f.sum(0), (f > 0).sum(0)], dtype=np.float64)
        start += len(f)
    inside, total, firings = sums
    share = np.where(firings >= LEAST_FIRINGS, inside / np.maximum(total, 1e-30), 0.0)
    tokens = Counter(t for row in rows[holds] for t in contexts.first_tokens(wanted, row))
    return share, float(holds.mean()), tokens.most_common(1)[0][0]
