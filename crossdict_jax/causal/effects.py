"""Feature transfer: does the image of one model's feature do the feature's work in the other?

A feature of A is added to A where it fires: the tokens that become likelier are what it promotes.
Its image is added to B at the same places of the text: do B's tokens of the same text become
likelier, more than under other directions of the same norm? Everything here works on arrays and
models; ``causal.features`` makes them from a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crossdict_jax import stats
from crossdict_jax.causal import scores
from crossdict_jax.causal.conclude import conclude
from crossdict_jax.causal.inject import Injector, Positions
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.errors import UserError
from crossdict_jax.stats import Estimate, Resamples, columns

MATCH = "match"  # the image that is B's own feature which correlates best with A's
LONGEST_SPAN = 8  # tokens between two neighbouring common ends that are edited or scored
ABLATED_CONTROLS = 4  # other features' images taken out of B for every image
LEAST_OTHERS = 3  # features whose images an image is compared with
NORMS = ("residual", "feature", "mapped", "image")


class NothingToTest(UserError):
    """Two dictionaries or texts are too poor for a test of single features."""


@dataclass(frozen=True)
class Plan:
    """How features are put to the test; see ``config.InterventionConfig`` for each."""

    contexts: int = 16
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    norm: str = "residual"
    whole_span: bool = False
    whole_prompt: bool = False
    promoted: int = 10
    random_directions: int = 16
    shuffled_features: int = 16
    kl_budget: float = 0.1
    fdr: float = 0.05
    bootstrap: int = 200
    seed: int = 0

    def __post_init__(self):
        if not self.alphas or not np.isfinite(self.alphas).all() or min(self.alphas) < 0:
            raise UserError(
                f"intervention.alphas={self.alphas} must be finite numbers, 0 or above."
            )
        if self.norm not in NORMS:
            raise UserError(f"intervention.norm={self.norm} must be one of {', '.join(NORMS)}.")

    @property
    def doses(self) -> np.ndarray:
        return np.array(sorted(self.alphas))

    @property
    def scored(self) -> int:
        """Which dose the score is taken at: the middle one, said before anything is seen."""
        return len(self.alphas) // 2

    @property
    def span(self) -> int:
        return LONGEST_SPAN if self.whole_span else 1


@dataclass(frozen=True)
class Ground:
    """One model's half of paired places: row i of A's and of B's is one place of the text."""

    injector: Injector
    places: Positions

    def median_norm(self) -> float:
        return median_norm(self.injector, self.places)


@dataclass(frozen=True)
class Directions:
    """What some rung (or the match) makes of A's features, in B.

    Attributes:
      vectors: float32 [features, d_b], per unit of A's activation.
      strength: float32 [n, features] B's own activations, of the match alone; else None.
    """

    vectors: np.ndarray
    strength: np.ndarray | None = None


@dataclass(frozen=True)
class Experiment:
    """Features of A, their images in B, and the paired places at which they are tested.

    Attributes:
      documents: int [n], of every paired place.
      features: ids of A's features, tested ones first; the others only lend their images.
      tested: how many of them are tested.
      strength: float32 [n, features], A's activations: 0 where a feature does not fire.
      directions: float32 [features, d_a], what a feature adds to A per unit of activation.
      mapped: by the name of the rung.
      mean: float32 [d_b], the mean activation of B.
    """

    source: Ground
    target: Ground
    documents: np.ndarray
    features: Sequence[int]
    tested: int
    strength: np.ndarray
    directions: np.ndarray
    mapped: Mapping[str, Directions]
    mean: np.ndarray
    translation: Translation


def transfer(
    experiment: Experiment,
    plan: Plan,
    *,
    known: Mapping[int, dict] | None = None,
    keep: Callable[[int, dict], None] = lambda feature, record: None,
) -> tuple[list[dict], list[dict]]:
    """Returns (a row per tested feature and image, a summary row per image).

    Args:
      known: records of features that an earlier, interrupted call has finished.
      keep: called with every new record (JSON values), as soon as it is there.

    Raises:
      NothingToTest: too few other features to borrow images from, or no promoted token exists in
        the target's vocabulary.
    """
    _check(experiment, plan)
    known = known or {}
    norms = experiment.source.median_norm(), experiment.target.median_norm()
    records = []
    for i in range(experiment.tested):
        feature = int(experiment.features[i])
        if feature not in known:
            record = _Test(experiment, plan, i, *norms).record()
            keep(feature, record)
        else:
            record = known[feature]
        records.append(record)
    if not any(record["directions"] for record in records):
        raise NothingToTest(
            "No token that the features promote in the source exists in the target's vocabulary; "
            "raise intervention.promoted or test other features."
        )
    return conclude(records, fdr=plan.fdr, bootstrap=plan.bootstrap, seed=plan.seed)


def _check(experiment: Experiment, plan: Plan) -> None:
    others = len(experiment.features) - 1
    if others < LEAST_OTHERS:
        raise NothingToTest(
            f"There are {others} other features, and controls need {LEAST_OTHERS} or more; raise "
            "intervention.documents or train the dictionary for longer."
        )
    if plan.random_directions < 3 or plan.shuffled_features < 3:
        raise UserError(
            "Controls need 3 directions or more: intervention.random_directions="
            f"{plan.random_directions}, intervention.shuffled_features={plan.shuffled_features}."
        )


def choose_contexts(
    strength: np.ndarray, documents: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns at most ``count`` rows at which a feature fires, from as many documents as can be.

    Args:
      strength: [n], the feature's activations.
      documents: int [n].
    """
    rows = generator.permutation(np.flatnonzero(strength > 0))
    order = np.argsort(documents[rows], kind="stable")
    grouped = documents[rows][order]
    turn = np.arange(len(rows)) - np.searchsorted(grouped, grouped)  # 0, 1, .. in each document
    rounds = np.empty(len(rows), int)
    rounds[order] = turn
    return np.sort(rows[np.argsort(rounds, kind="stable")[:count]])


def median_norm(injector: Injector, places: Positions) -> float:
    """Returns the median norm of the activations at the last edited tokens of places."""
    return float(np.median(np.linalg.norm(injector.clean(places), axis=1)))


def dose_norms(
    norm: str,
    medians: tuple[float, float],
    *,
    strength: float,
    direction: np.ndarray,
    mapped: np.ndarray,
) -> tuple[float, float]:
    """Returns the norms of what a dose of 1 adds to A and to B.

    Args:
      norm: "residual" (the median norm of the activations), "feature" (what the feature adds to A
        on average, in B at the same share of the median norm) or "image" (likewise, in B the image
        at its own norm).
      medians: norms of A's and of B's activations.
      strength: A's mean activation of the feature where it fires.
      direction, image: [d_a] and [d_b], per unit of activation.
    """
    own = float(strength * np.linalg.norm(direction))
    if norm == "residual":
        return medians
    if norm == "feature":
        return own, own / medians[0] * medians[1]
    return own, float(strength * np.linalg.norm(mapped))


def mean_change(injector: Injector, ready, vector: np.ndarray) -> np.ndarray:
    """Returns by how much a vector [d_model] raises log p of every token, mean over places."""
    clean, edited = injector.log_probs(ready, vector[None])
    return (edited - clean).mean(0, dtype=np.float64)


def most_promoted(change: np.ndarray, has_text: np.ndarray, *, count: int) -> dict[int, float]:
    """Returns {token: change of its log p} of the tokens with text that are raised the most.

    Args:
      change: [vocabulary], which may be padded beyond the tokenizer's.
      has_text: bool [tokens].
    """
    change = np.where(has_text[: len(change)], change[: len(has_text)], 0.0)
    top = np.argsort(-change, kind="stable")[:count]
    return {int(t): float(change[t]) for t in top if change[t] > 0}


# ---------------------------------------------------------------- one feature


class _Test:
    """One feature at its contexts in both models."""

    def __init__(self, e: Experiment, plan: Plan, i: int, norm_a: float, norm_b: float):
        self.e, self.plan, self.i = e, plan, i
        self.feature = int(e.features[i])
        self.generator = np.random.Generator(np.random.Philox(key=[plan.seed, self.feature]))
        strength = e.strength[:, i]
        self.rows = choose_contexts(strength, e.documents, plan.contexts, self.generator)
        if not len(self.rows):
            raise UserError(f"Feature {self.feature} does not fire at any of the places read.")
        self.strength = strength[self.rows]
        self.draws = stats.draw(e.documents[self.rows], count=plan.bootstrap, seed=plan.seed)
        self.units = self._units(norm_a, norm_b)
        self.ready = [self._ready(ground) for ground in (e.source, e.target)]

    def _units(self, norm_a: float, norm_b: float) -> tuple[float, float]:
        """The norms of a dose of 1 in A and in B."""
        return dose_norms(
            self.plan.norm,
            (norm_a, norm_b),
            strength=float(self.strength.mean()),
            direction=self.e.directions[self.i],
            mapped=next(iter(self.e.mapped.values())).vectors[self.i],
        )

    def _ready(self, ground: Ground):
        places, plan = ground.places.take(self.rows), self.plan
        span = plan.span
        if plan.whole_prompt:
            span = ground.injector.tokens.shape[1]
            places = places._replace(first=np.minimum(1, places.last))
        return ground.injector.ready(places, size=plan.contexts, span=span)

    def record(self) -> dict:
        """Returns what this feature does, as JSON values."""
        promoted, effect_source = self._promoted()
        mapped = self._mapped(promoted)
        text = self.e.translation.text
        record = {
            "feature": self.feature,
            "n_contexts": len(self.rows),
            "n_documents": self.draws.n_documents,
            "firings": int((self.e.strength[:, self.i] > 0).sum()),
            "promoted_source": [text("a", t) for t in promoted],
            "promoted_target": [text("b", t) for t in mapped],
            "promoted_dropped": sum(self._in_target(t) is None for t in promoted),
            "effect_source": effect_source,
            "directions": self._effects(mapped) if mapped else {},
        }
        for name, ablation in self._ablations().items():
            if name in record["directions"]:
                record["directions"][name] |= ablation
        return _plain(record)

    def _promoted(self) -> tuple[dict[int, float], list[float]]:
        """{token: by how much the feature makes it likelier in A}, and their mean at every dose."""
        e, plan = self.e, self.plan
        doses = self.units[0] * plan.doses[:, None] * normalised(e.directions[self.i])[None, :]
        injector, ready = e.source.injector, self.ready[0]
        change = mean_change(injector, ready, doses[plan.scored])
        promoted = most_promoted(change, e.translation.has_text, count=plan.promoted)
        if not promoted:  # no direction at all, or no dose
            return {}, [0.0] * len(doses)
        effects, _ = injector.changes(ready, doses, promoted, most=plan.promoted)
        return promoted, effects.mean(1, dtype=np.float64).tolist()

    def _mapped(self, promoted: dict[int, float]) -> dict[int, float]:
        """The same in B's tokens; those that begin alike there share one token."""
        mapped = {}
        for token, change in promoted.items():
            found = self._in_target(token)
            if found is not None:
                mapped[found] = mapped.get(found, 0.0) + change
        return mapped

    def _in_target(self, token: int) -> int | None:
        found = self.e.translation.to_b(token)
        return None if found is None or found >= self.e.target.injector.vocab_size else found

    def _effects(self, mapped: dict[int, float]) -> dict[str, dict]:
        """What every image, and every control, does to the mapped tokens at every dose."""
        e, plan = self.e, self.plan
        parts = {("random",): self._random(), ("mean",): e.mean[None]}
        for name, image in e.mapped.items():
            parts[name, "image"] = image.vectors[self.i][None]
            parts[name, "shuffled"] = image.vectors[self._others()]
        unit = normalised(np.concatenate([np.atleast_2d(p) for p in parts.values()]))
        vectors = self.units[1] * unit[:, None, :] * plan.doses[None, :, None]
        change, kl = e.target.injector.changes(
            self.ready[1], vectors.reshape(-1, unit.shape[1]), mapped, most=plan.promoted
        )
        shape = (len(unit), len(plan.doses), -1)
        change, kl = (a.reshape(shape).astype(np.float64) for a in (change, kl))
        starts = np.cumsum([0, *(len(p) for p in parts.values())])
        where = {name: slice(*starts[k : k + 2]) for k, name in enumerate(parts)}
        return {
            name: self._scored(
                change,
                kl,
                own=where[name, "image"].start,
                controls={"random": where[("random",)], "shuffled": where[name, "shuffled"]},
                mean=where[("mean",)].start,
            )
            for name in e.mapped
        }

    def _random(self) -> np.ndarray:
        return self.generator.normal(size=(self.plan.random_directions, len(self.e.mean)))

    def _others(self) -> np.ndarray:
        """Which features lend their images: the same for every image of this feature."""
        generator = np.random.Generator(np.random.Philox(key=[self.plan.seed + 1, self.feature]))
        others = np.delete(np.arange(len(self.e.features)), self.i)
        return generator.permutation(others)[: self.plan.shuffled_features]

    def _scored(
        self, change: np.ndarray, kl: np.ndarray, *, own: int, controls: dict[str, slice], mean: int
    ) -> dict:
        """One image's numbers, from arrays [directions, doses, contexts]."""
        at, draws = self.plan.scored, self.draws
        spent, spent_kl = scores.at_budget(kl, change, self.plan.kl_budget)
        out = {
            **columns("effect", draws.mean(change[own, at])),
            "kl": kl[own, at].mean(),
            "effect_mean_direction": change[mean, at].mean(),
            **columns("effect_at_kl", draws.mean(spent[own])),
            "kl_spent": spent_kl[own],
        }
        for family, rows in controls.items():
            null = change[rows, at].mean(0)
            out[f"effect_{family}"] = null.mean()
            out[f"kl_{family}"] = kl[rows, at].mean()
            out |= columns(f"specific_{family}", draws.mean(change[own, at] - null))
            difference = spent[own] - spent[rows].mean(0)
            out |= columns(f"specific_{family}_at_kl", draws.mean(difference))
            out[f"null_{family}"] = change[rows, at].mean(1)
        out["doses"] = self._doses(change, kl, own, controls)
        return out

    def _doses(self, change, kl, own: int, controls: dict[str, slice]) -> list[dict]:
        doses = []
        for d, alpha in enumerate(self.plan.doses):
            dose = {"alpha": alpha, "effect": change[own, d].mean(), "kl": kl[own, d].mean()}
            for family, rows in controls.items():
                effects = change[rows, d].mean(1)
                low, high = np.percentile(effects, (2.5, 97.5))
                dose |= {family: effects.mean(), f"{family}_low": low, f"{family}_high": high}
                dose[f"{family}_kl"] = kl[rows, d].mean()
            doses.append(dose)
        return doses

    # ------------------------------------------------------------ ablation

    def _ablations(self) -> dict[str, dict]:
        """{image: how its removal from B goes together with the feature's removal from A}."""
        e = self.e
        sizes = {"size": self.plan.contexts, "span": self.plan.span, "reads": LONGEST_SPAN}
        grounds = e.source, e.target
        ready = [
            g.injector.ready(g.places.take(self.rows), **sizes, read=read)
            for g, read in zip(grounds, self.ready)
        ]
        own = e.source.injector.continuations(
            ready[0], e.directions[self.i][None], -self.strength[None]
        )[0].astype(np.float64)
        others = self._others()[:ABLATED_CONTROLS]
        vectors, strength = [], []
        for image in e.mapped.values():
            by = self.strength if image.strength is None else image.strength[self.rows, self.i]
            vector = image.vectors[self.i]
            shuffled = np.linalg.norm(vector) * normalised(image.vectors[others])
            vectors += [vector[None], shuffled]
            strength += [np.tile(-by, (1 + len(others), 1))]
        changes = e.target.injector.continuations(
            ready[1], np.concatenate(vectors), np.concatenate(strength)
        ).astype(np.float64)
        each = np.split(changes, len(e.mapped))
        # Only where the text goes on in both models is there a continuation to be scored.
        on = np.all([g.places.end[self.rows] > g.places.last[self.rows] for g in grounds], axis=0)
        draws = replace(self.draws, index=self.draws.index[on])
        return {name: _agreement(draws, own[on], c[:, on]) for name, c in zip(e.mapped, each)}


def _agreement(draws: Resamples, own: np.ndarray, changes: np.ndarray) -> dict:
    """How B's changes [1 + shuffled, n] go together with A's own [n]."""
    shuffled = (correlation(draws, own, change) for change in changes[1:])
    defined = [r.value for r in shuffled if r is not None]
    return {
        "ablation_n": len(own),
        **columns("ablation_r", correlation(draws, own, changes[0])),
        "ablation_r_shuffled": float(np.mean(defined)) if defined else None,
    }


def correlation(draws: Resamples, a: np.ndarray, b: np.ndarray) -> Estimate | None:
    """Returns Pearson's r of a and b [n] over resamples of documents; None if one is constant."""
    if len(a) < 3:
        return None
    a, b = a - a.mean(), b - b.mean()
    if not a.any() or not b.any():
        return None
    sums = np.stack([draws.per_document(v) for v in (np.ones_like(a), a, b, a * a, b * b, a * b)])

    def r(sums):  # [6, ...]
        n, sa, sb, aa, bb, ab = sums
        spread = np.sqrt(np.maximum((n * aa - sa**2) * (n * bb - sb**2), 0))
        return np.divide(n * ab - sa * sb, spread, out=np.zeros_like(spread), where=spread > 0)

    return Estimate(float(r(sums.sum(1))), r(sums @ draws.weights.T))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Returns the rows at norm 1; a zero row stays, and does nothing."""
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)


def _plain(tree):
    """Returns numpy numbers and arrays as JSON values."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    return tree.tolist() if isinstance(tree, (np.ndarray, np.generic)) else tree
