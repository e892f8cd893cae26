"""A feature of A: named by its number or found by a text, and what it promotes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.activations.passages import Contexts, passages_of
from crossdict_jax.causal import effects
from crossdict_jax.causal.directions import MapGroup
from crossdict_jax.causal.feature_transfer import with_continuations
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError

CANDIDATES = 8  # features that a search lists
STRONGEST = 20  # rows by which a search judges a feature
LEAST_FIRINGS = 4  # rows, for a feature to be judged at all
SHOWN = 3  # strongest contexts of the feature


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

    def at_rows(self, rows: np.ndarray) -> effects.ModelAtSite:
        """The model on the windows of some rows, ascending."""
        store, (model, site) = self.run.store, self.group.ends[0]
        passages = with_continuations(store, model, passages_of(store, model, rows))
        return effects.ModelAtSite(self.run.runner(model), site, passages)


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
    train, test = run.rows("train"), run.rows("test")
    config, settings, dictionary = run.config, run.config.steer, run.dictionary(*a)
    feature, candidates, site = settings.feature, [], f"{group.source} at {group.site_source}"
    if settings.search:
        candidates = search(source, settings.search)
        feature = candidates[0]["feature"]
    elif feature >= dictionary.width:
        raise UserError(
            f"steer.feature={feature}: {site} has features 0 to {dictionary.width - 1}."
        )
    strength, held_out = (
        np.concatenate([f[:, feature] for f in run.codes(*a, rows)]) for rows in (train, test)
    )
    asked = f"steer.feature={feature}: feature {feature} of {site}"
    if not strength.any():
        raise UserError(
            f"{asked} is dead, it fires at none of the {len(train)} training positions read; "
            "choose another, or find one by steer.search."
        )
    if not held_out.any():
        raise UserError(
            f"{asked} fires at none of the {len(test)} held-out positions read, so nobody "
            "can say what it promotes; choose another."
        )
    generator = stats.generator(config.seed, feature)
    documents, count = run.store.rows.document[test], config.intervention.contexts
    rows = effects.choose_contexts(held_out, documents, count, generator)
    model = source.at_rows(test[rows])
    direction = decoder_rows(dictionary, np.array([feature]))[0]
    added = float(held_out[rows].mean() * np.linalg.norm(direction))
    norm, _ = effects.dose_norms(settings.norm, (model.median_norm,) * 2, added, added)
    dose = norm * source.dose * effects.normalised(direction)
    change = effects.mean_change(model.hold(size=count, span=1), dose)
    promoted = effects.most_promoted(change, source.words.has_text)
    below = run.runner(group.target).config.vocab_size
    mapped = source.words.weights_in_b(promoted, below=below)
    return Feature(feature, strength, direction, model.median_norm, promoted, mapped, candidates)


def search(source: Source, text: str) -> list[dict]:
    """Returns features that fire around a text in training text, or make its first token likelier.

    The latter at one norm, the middle dose, at the same held-out positions; who does it the most
    comes first. UserError if no feature does either.
    """
    run, a, count = source.run, source.group.ends[0], source.run.config.intervention.contexts
    train, test = run.rows("train"), run.rows("test")
    share, live, base, token = around(text, source.contexts, train, run.codes(*a))
    live = np.flatnonzero(live & np.any([(f > 0).any(0) for f in run.codes(*a, test)], axis=0))
    generator = stats.generator(run.config.seed)
    model = source.at_rows(np.sort(generator.permutation(test)[:count]))
    dose = model.median_norm * source.dose
    effect: dict[int, float] = {}
    if len(live):
        directions = dose * effects.normalised(decoder_rows(run.dictionary(*a), live))
        held = model.hold(size=count, span=1)
        change, _ = held.changes(directions, {token: 1.0}, limit=1)
        effect = dict(zip(live.tolist(), change.mean(1, dtype=np.float64).tolist()))
    by_share = sorted(effect, key=lambda i: -share[i])
    by_effect = sorted(effect, key=lambda i: -effect[i])
    firing = [i for i in by_share[: CANDIDATES // 2] if share[i] > base]
    others = [i for i in by_effect if effect[i] > 0 and i not in firing]
    listed = {*firing, *others[: CANDIDATES - len(firing)]}
    if not listed:
        raise UserError(
            f"steer.search={text!r} finds no feature: none fires around it or makes it likelier; "
            "search for other text."
        )
    about = {"base": base, "token": source.words.text("a", token)}
    return [
        {"feature": i, "share": float(share[i]), "promotes": effect[i]} | about
        for i in by_effect
        if i in listed
    ]


def around(
    text: str, contexts: Contexts, rows: np.ndarray, codes: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Returns which features fire around a text: (share, live, base, token).

    share [width]: of each feature's strongest rows, how many have the text around them; live
    [width]: it fires often enough to be judged; base: the share of all rows; token: the commonest
    one in which the text begins. UserError if it stands around none.

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
    start, index, value = 0, None, None  # of each feature's strongest rows, in any order
    for f in codes:
        rows_of = np.broadcast_to(np.arange(start, start + len(f))[:, None], f.shape)
        index = rows_of if index is None else np.concatenate([index, rows_of])
        value = f if value is None else np.concatenate([value, f])
        start += len(f)
        if len(value) > STRONGEST:
            top = np.argpartition(-value, STRONGEST - 1, axis=0)[:STRONGEST]
            index, value = (np.take_along_axis(a, top, axis=0) for a in (index, value))
    fires = value > 0  # [STRONGEST or fewer, width]
    firings = fires.sum(0)
    tokens = Counter(t for row in rows[holds] for t in contexts.first_tokens(wanted, row))
    share = (holds[index] & fires).sum(0) / np.maximum(firings, 1)
    return share, firings >= LEAST_FIRINGS, float(holds.mean()), tokens.most_common(1)[0][0]
