"""Feature transfer: a feature of A is added to A where it fires, its mapped direction to B at the
same positions. Do the tokens that A promotes get likelier in B, beyond controls of equal norm?
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from scipy.stats import binomtest, false_discovery_control

from crossdict_jax import stats
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.models.run import Held, Passages, Runner
from crossdict_jax.stats import Resamples, columns, normalised

MATCH = "match"  # B's own feature that correlates best with A's
PROMOTED = 10  # tokens that a feature makes likelier; the tail of the list is noise
CONTROLS = 20  # of each family, at least; p-values pool those of all features
LEAST_OTHERS = 3  # fewer have no spread
ABLATED_CONTROLS = 4  # of the other features: one correlation each, averaged
MIN_REMOVALS = 5  # contexts: with one, r is the same for every direction
KL_BUDGET = 0.1  # nats a token, at which effects are compared too; it leaves most text as it is
LONGEST_SPAN = 8  # tokens between two common ends that are edited, or scored as a continuation
FAMILIES = ("random", "shuffled")  # of controls: random directions, other features' directions


def controls_at(fdr: float) -> int:
    """Returns how many controls of each family let one feature alone reach the discovery rate.

    Among n m controls of m features p is 1 / (n m + 1) or more, and q of a lone discovery m times
    that.
    """
    return max(CONTROLS, math.ceil(1 / fdr))


class NothingToTest(UserError):
    """Dictionaries or texts are too poor for a test of single features."""


@dataclass(frozen=True)
class ModelAtSite:
    """A language model at a site, and the positions of texts at which vectors are added there."""

    runner: Runner
    site: Site
    passages: Passages  # with ``first`` and ``end``

    @cached_property
    def texts(self) -> np.ndarray:
        """Activations of all texts, float32 [texts, seq, d_model]."""
        return self.runner.read(self.passages.tokens, [self.site])[self.site]

    @property
    def x(self) -> np.ndarray:
        """Activations at the positions, float32 [n, d_model]."""
        return self.texts[self.passages.window, self.passages.position]

    @cached_property
    def median_norm(self) -> float:
        return float(np.median(np.linalg.norm(self.x, axis=1)))

    def hold(self, rows: np.ndarray | slice = slice(None), **settings) -> Held:
        """Returns the texts read up to some of the positions; see ``Runner.hold``."""
        return self.runner.hold(self.site, self.passages.take(rows), self.texts, **settings)


@dataclass(frozen=True)
class Directions:
    """A's features in B, by a map or the match."""

    vectors: np.ndarray  # float32 [features, d_b], per unit of A's activation
    strength: np.ndarray | None = None  # float32 [n, features], B's activations; match only


@dataclass(frozen=True)
class Experiment:
    """Features of A, their directions in B, and the n paired positions at which they are tested."""

    source: ModelAtSite  # A
    target: ModelAtSite  # B; position i is the same in the text
    documents: np.ndarray  # int [n]
    features: Sequence[int]  # of A, tested ones first; the others only lend their directions
    tested: int
    strength: np.ndarray  # float32 [n, features], A's activations
    directions: np.ndarray  # float32 [features, d_a], what a feature adds to A per unit
    mapped: Mapping[str, Directions]  # by map, and by the match
    translation: Translation


def transfer(
    experiment: Experiment,
    config: Config,
    *,
    part: Callable[[int, Callable[[], dict]], dict] = lambda feature, make: make(),
) -> tuple[list[dict], list[dict]]:
    """Returns (a row per tested feature and direction, a summary row per direction).

    Args:
      part: (feature, function that makes its record) -> the record, perhaps a kept one.

    Raises:
      NothingToTest: too few other features, or no promoted token is in the target's vocabulary.
    """
    others = len(experiment.features) - 1
    if others < LEAST_OTHERS:
        raise NothingToTest(
            f"There are {others} other features, and controls need {LEAST_OTHERS} or more; raise "
            "intervention.documents or train the dictionary for longer."
        )
    records = [
        part(int(experiment.features[i]), partial(measure, experiment, config, i))
        for i in range(experiment.tested)
    ]
    if not any(record["directions"] for record in records):
        raise NothingToTest(
            "No token that the features promote in the source exists in the target's vocabulary; "
            "test other features."
        )
    return conclude(records, config)


def measure(e: Experiment, config: Config, i: int) -> dict:
    """Returns the i-th feature's record, JSON values; UserError if it fires at no position."""
    settings, feature = config.intervention, int(e.features[i])
    generator = stats.generator(config.seed, feature)
    rows = choose_contexts(e.strength[:, i], e.documents, settings.contexts, generator)
    if not len(rows):
        raise UserError(f"Feature {feature} does not fire at any of the positions read.")
    draws = stats.draw(e.documents[rows], count=config.evaluation.bootstrap, seed=config.seed)
    doses, words, sides = np.array(sorted(settings.alphas)), e.translation, (e.source, e.target)
    mean, medians = e.strength[rows, i].mean(), tuple(side.median_norm for side in sides)
    in_a, *in_maps = (
        float(mean * np.linalg.norm(v))
        for v in (e.directions[i], *(of_map.vectors[i] for of_map in e.mapped.values()))
    )
    norms = [dose_norms(settings.norm, medians, in_a, in_map) for in_map in in_maps]
    span = LONGEST_SPAN if settings.span == "whole" else 1
    edited = None if settings.positions == "prompt" else span
    held = [side.hold(rows, size=settings.contexts, span=edited) for side in sides]
    dose = norms[0][0] * doses[len(doses) // 2] * normalised(e.directions[i])
    promoted = promoted_tokens(held[0], dose, words.has_text)
    in_b = words.weights_in_b(promoted, below=e.target.runner.config.vocab_size)

    # The same other features for every direction, whatever else is drawn.
    others = np.delete(np.arange(len(e.features)), i)
    n = controls_at(config.evaluation.fdr)
    others = stats.generator(config.seed + 1, feature).permutation(others)[:n]
    directions: dict[str, dict] = {}
    if in_b:
        random, groups = generator.normal(size=(n, e.target.texts.shape[-1])), {}
        for (name, of_map), (_, norm) in zip(e.mapped.items(), norms):
            groups["random", norm] = norm, random  # the same for maps of one norm
            groups[name, "itself"] = norm, of_map.vectors[[i]]
            groups[name, "shuffled"] = norm, of_map.vectors[others]
        exact = ((norm, group.astype(np.float64)) for norm, group in groups.values())
        units = [norm * normalised(group)[:, None, :] for norm, group in exact]
        vectors = np.concatenate(units) * doses[None, :, None]
        flat = vectors.reshape(-1, vectors.shape[-1])
        # [change of log p of the tokens and KL, in nats; vectors, doses, contexts]
        curves = np.stack(held[1].changes(flat, in_b, limit=PROMOTED))
        curves = curves.astype(np.float64).reshape(2, *vectors.shape[:2], -1)
        ends = np.cumsum([len(unit) for unit in units])
        parts = dict(zip(groups, np.split(curves, ends[:-1], axis=1)))
        held = [
            side.hold(rows, size=settings.contexts, span=span, reads=LONGEST_SPAN, same_texts=h)
            for side, h in zip(sides, held)
        ]
        removals = _removals(e, i, rows, held, draws, others[:ABLATED_CONTROLS])
        for (name, removal), (_, norm) in zip(removals.items(), norms):
            controls = {"random": parts["random", norm], "shuffled": parts[name, "shuffled"]}
            effects = _effects(parts[name, "itself"][:, 0], controls, doses, draws)
            directions[name] = effects | removal
    record = {
        "feature": feature,
        "n_contexts": len(rows),
        "n_documents": draws.n_documents,
        "firings": int((e.strength[:, i] > 0).sum()),
        "promoted_source": [words.text("a", token) for token in promoted],
        "promoted_target": [words.text("b", token) for token in in_b],
        "directions": directions,
    }
    return json.loads(json.dumps(record, default=lambda array: array.tolist()))


def _effects(
    itself: np.ndarray, controls: dict[str, np.ndarray], doses: np.ndarray, draws: Resamples
) -> dict:
    """A direction's numbers beside its controls, at the middle dose and at equal KL.

    itself is (change, KL) [2, doses, contexts], each family of controls [2, n, doses, contexts].
    """
    (effect, kl), middle = itself, len(doses) // 2
    spends = kl[None], *(spent for _, spent in controls.values())
    budget = min(KL_BUDGET, *(spent.mean(-1).max(-1).min() for spent in spends))
    (at_kl,) = at_budget(kl[None], effect[None], budget)
    out = {
        **columns("effect", draws.mean(effect[middle])),
        "kl": kl[middle].mean(),
        "kl_budget": budget,
        **columns("effect_at_kl", draws.mean(at_kl)),
        "doses": [
            {"alpha": alpha, "effect": effect[d].mean(), "kl": kl[d].mean()}
            for d, alpha in enumerate(doses)
        ],
    }
    for family, (change, spent) in controls.items():
        lead = effect[middle] - change[:, middle].mean(0)
        lead_at_kl = at_kl - at_budget(spent, change, budget).mean(0)
        out |= columns(f"specific_{family}", draws.mean(lead))
        out |= columns(f"specific_{family}_at_kl", draws.mean(lead_at_kl))
        out[f"null_{family}"] = change[:, middle].mean(1)
        for d, dose in enumerate(out["doses"]):
            effects = change[:, d].mean(1)
            low, high = np.percentile(effects, (2.5, 97.5))
            dose |= {family: effects.mean(), f"{family}_low": low, f"{family}_high": high}
    return out


def _removals(
    e: Experiment, i: int, rows, held: list[Held], draws: Resamples, others
) -> dict[str, dict[str, float | None]]:
    """{direction: correlation of the effects of its removal from B and the feature's from A}.

    Pearson's r, over positions, of the changes of log p of each position's continuation; None where
    B has something to remove at fewer than MIN_REMOVALS: then r tells these apart from the rest.
    """
    strength, vectors, by = e.strength[rows, i], [], []
    for directions in e.mapped.values():
        vector = directions.vectors[i]
        vectors += [vector[None], np.linalg.norm(vector) * normalised(directions.vectors[others])]
        in_b = strength if directions.strength is None else directions.strength[rows, i]
        by += [np.tile(-in_b, (1 + len(others), 1))]
    removed = held[0].continuations(e.directions[[i]], -strength[None])[0]
    vectors, by = np.concatenate(vectors), np.concatenate(by)
    changes = held[1].continuations(vectors, by)
    # A continuation exists where the text goes on in both models.
    at = [side.passages.take(rows) for side in (e.source, e.target)]
    scored = np.all([passages.end > passages.position for passages in at], axis=0)
    draws = replace(draws, index=draws.index[scored])
    removed, changes = (a.astype(np.float64)[..., scored] for a in (removed, changes))
    out = {}
    n = len(e.mapped)
    for name, each, amounts in zip(e.mapped, np.split(changes, n), np.split(by, n)):
        enough = np.count_nonzero(amounts[0, scored]) >= MIN_REMOVALS
        r, *shuffled = (stats.correlation(draws, removed, c) if enough else None for c in each)
        defined = [estimate.value for estimate in shuffled if estimate is not None]
        mean = np.mean(defined) if defined else None
        out[name] = columns("ablation_r", r) | {"ablation_r_shuffled": mean}
    return out


def conclude(records: Sequence[dict], config: Config) -> tuple[list[dict], list[dict]]:
    """Returns the rows and summaries of ``transfer`` from the features' records.

    A feature transfers where its direction beats both families of controls: its p is the larger of
    the two, and the false discovery rate over the direction's features is at most
    ``evaluation.fdr``. Intervals of summaries are over features.
    """
    all_rows, summaries, settings = [], [], config.evaluation
    for name in dict.fromkeys(name for record in records for name in record["directions"]):
        rows = [
            {"direction": name} | record | record["directions"][name]
            for record in records
            if name in record["directions"]
        ]
        effects, p = np.array([row["effect"] for row in rows]), {}
        for family in FAMILIES:
            nulls = np.array([row.pop(f"null_{family}") for row in rows])
            p[f"p_{family}"] = stats.pooled_p(effects, nulls)
        p["p"] = np.maximum(*p.values())
        p["q"] = false_discovery_control(p["p"])
        for i, row in enumerate(rows):
            del row["directions"]
            row |= {key: float(values[i]) for key, values in p.items()}
            row["transfers"] = row["q"] <= settings.fdr
        all_rows += rows
        hits, tested = sum(row["transfers"] for row in rows), len(records)
        wilson = binomtest(hits, tested).proportion_ci(method="wilson")  # 95 %
        summary = {
            "direction": name,
            "n_features": tested,
            "n_scored": len(rows),
            "n_transferring": hits,
            "share_transferring": hits / tested,
            "share_transferring_low": wilson.low,
            "share_transferring_high": wilson.high,
        }
        leads = [f"specific_{family}{at}" for at in ("", "_at_kl") for family in FAMILIES]
        for key in ("effect", "kl", *leads, "ablation_r", "ablation_r_shuffled"):
            values = np.array([row[key] for row in rows if row[key] is not None])
            features, mean = np.arange(len(values)), None
            if len(values):  # a removal has no correlation where texts end at once
                mean = stats.draw(features, count=settings.bootstrap, seed=config.seed).mean(values)
            summary |= columns(key, mean)
        summary["n_ablation"] = sum(row["ablation_r"] is not None for row in rows)
        summaries.append(summary)
    match = next((s["specific_random"] for s in summaries if s["direction"] == MATCH), None)
    for row in summaries:
        row["of_match"] = row["specific_random"] / match if match and match > 0 else None
    return all_rows, summaries


def choose_contexts(
    strength: np.ndarray, documents: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns at most ``count`` rows at which a feature fires, from as many documents as can be."""
    rows = generator.permutation(np.flatnonzero(strength > 0))
    order = np.argsort(documents[rows], kind="stable")
    grouped = documents[rows][order]
    turn = np.arange(len(rows)) - np.searchsorted(grouped, grouped)  # 0, 1, .. in each document
    rounds = np.empty(len(rows), int)
    rounds[order] = turn
    return np.sort(rows[np.argsort(rounds, kind="stable")[:count]])


def dose_norms(
    norm: str, medians: tuple[float, float], in_a: float, in_b: float
) -> tuple[float, float]:
    """Returns the norms of what a dose of 1 adds to A and to B.

    Args:
      norm: "residual" (the medians), "feature" (the feature's mean norm in A, the same share of
        the median in B) or "mapped" (in B the mapped direction's norm).
      medians: of the norms of A's and of B's activations.
      in_a, in_b: norms of what the feature, where it fires, and its mapped direction add.
    """
    if norm == "residual":
        return medians
    return in_a, in_a / medians[0] * medians[1] if norm == "feature" else in_b


def at_budget(kl: np.ndarray, values: np.ndarray, budget: float) -> np.ndarray:
    """Returns the values of every direction at the dose that spends a KL budget, [directions, n].

    kl (its mean over n is spent) and values are [directions, doses, n]. Doses are interpolated
    linearly from 0; every direction spends the budget at some dose.
    """
    kl, values = (np.pad(a, ((0, 0), (1, 0), (0, 0))) for a in (kl, values))
    spent = kl.mean(-1)  # [directions, 1 + doses]
    reached = spent >= budget * (1 - 1e-9)  # a mean may have been summed in another order
    after, rows = np.maximum(reached.argmax(1), 1), np.arange(len(kl))
    low, high = spent[rows, after - 1], spent[rows, after]
    share = (budget - low) / np.maximum(high - low, 1e-30)
    low, high = values[rows, after - 1], values[rows, after]
    return low + share[:, None] * (high - low)


def promoted_tokens(held: Held, vector: np.ndarray, has_text: np.ndarray) -> dict[int, float]:
    """Returns {token: nats} of the tokens whose log p a vector [d_model] raises most.

    The mean over positions, of tokens with text; ``has_text`` is bool [vocabulary].
    """
    clean, edited = held.log_probs(vector[None])
    change = (edited - clean).mean(0, dtype=np.float64)
    change = np.where(has_text[: len(change)], change[: len(has_text)], 0.0)
    top = np.argsort(-change, kind="stable")[:PROMOTED]
    return {int(t): float(change[t]) for t in top if change[t] > 0}
