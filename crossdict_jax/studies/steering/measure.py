"""The question that launch.steer asks: what does B write with a feature of A put into it?"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, maps, models, results
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import best_matches, feature_directions, mapped_directions
from crossdict_jax.causal.effects import MATCH, dose_norms, normalised
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import Config
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Side, Task
from crossdict_jax.maps.base import encode_rows, map_class, slices
from crossdict_jax.report.tables import show
from crossdict_jax.stats import Resamples, columns, draw
from crossdict_jax.studies.steering.generation import Starts, Writer
from crossdict_jax.studies.steering.prompts import new_tokens, read_prompts
from crossdict_jax.studies.steering.section import (
    answers,
    facts,
    sentence,
    side_by_side,
    tables,
)
from crossdict_jax.studies.steering.source_feature import Feature, Source
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_jsonl

FOLDER = "steering"  # of results/ and of report/
RATES = ("token_rate", "piece_rate", "search_rate", "nll")


def run(config: Config, work: Workdir) -> None:
    """Writes the texts and their rates, and prints them side by side."""
    name = steer(config, work)
    (answer,) = answers(results.read(work, f"{FOLDER}/{name}.jsonl"))
    print("\n".join([answer.title, *(f"{key}: {words}" for key, words in facts(answer))]))
    show([side_by_side(answer, answer.doses[-1]), *tables(answer)])
    print(sentence(answer))


def steer(config: Config, work: Workdir) -> str:
    """Writes results/steering/NAME.jsonl and returns NAME, which speaks of what was asked.

    B (``steer.target``) continues prompts; the image of a feature of A is added to its activations
    at the target's layer, from the last token of the prompt on (so that every new token is
    predicted under it), or in all of the prompt but its first position. Beside it, with the same
    random numbers and the same norm: no edit, a random direction (another one for every text), and
    the feature of B that correlates best with A's on training rows (its native match).

    Rows are of three kinds: "feature" (what was put in), "condition" (what holds over all texts of
    one edit and dose, with 95 % intervals over texts) and "text".

      token_rate: share of the new tokens that are among those that the feature promotes in A,
        taken to B's vocabulary through the text.
      piece_rate: how often A's promoted tokens stand in the new text, per 100 bytes of it.
      search_rate: likewise the text that was searched for.
      nll: -log p of the new tokens under B without any edit, nats a token: what the steering costs.

    ..._more is the paired difference to the texts without an edit, ..._over_random that to the
    texts with a random direction of the same dose.

    Raises:
      UserError: anything that was asked for does not exist, is dead, or does not fit, or the run
        holds transcoders.
    """
    started = time.perf_counter()
    settings = config.steer
    if (settings.feature < 0) == (not settings.search):
        raise UserError(
            "steer.feature and steer.search: give one of them, as in --config.steer.feature=17 or "
            "--config.steer.search=himself."
        )
    refuse_transcoders(config, "Steering")
    store = open_store(work.activations)
    task = chosen_task(config, store)
    target = _Target(config, work, store, task)
    source = Source(config, work, store, task)
    feature = source.choose(translation(source.tokenizer, target.tokenizer))
    rows = list(_Study(config, source, target, feature).rows())
    name = _name(config, task, feature.id)
    write_jsonl(work.result(f"{FOLDER}/{name}.jsonl"), rows)
    work.record_timing(
        "steer",
        wall_s=time.perf_counter() - started,
        tokens=target.writer.tokens,
        tokens_per_s=target.writer.tokens / target.writer.seconds,
        **device_figures(),
    )
    return name


def chosen_task(config: Config, store: Store) -> Task:
    """Returns the map whose image is asked for; for the match any map of the place.

    Raises:
      UserError: the run has no such model, layer pair or map.
    """
    settings = config.steer
    source = settings.source or store.models[0]
    target = settings.target or next(m for m in store.models if m != source)
    for name, model in (("source", source), ("target", target)):
        if model not in store.models:
            known = ", ".join(store.models)
            raise UserError(f"steer.{name}={model} is no model of this run; use one of {known}.")
    if source == target:
        raise UserError(f"steer.source and steer.target are both {source}; name two models.")
    places: dict[str, list[Task]] = {}
    for task in maps.tasks(config, store):
        if (task.source, task.target, task.pairing) == (source, target, "aligned"):
            layers = f"{task.site_source.layer}:{task.site_target.layer}"
            places.setdefault(layers, []).append(task)
    asked = settings.layer_pair or list(places)[len(places) // 2]
    if asked not in places:
        raise UserError(
            f"steer.layer_pair={asked} is no layer pair from {source} to {target} in this run; use "
            f"one of {', '.join(places)}."
        )
    if settings.image == MATCH:
        return places[asked][0]
    kinds = {t.kind: t for t in places[asked] if map_class(t.kind).reads != "tokens"}
    if settings.image not in kinds:
        raise UserError(
            f"steer.image={settings.image} makes no image of a feature in this run; use one of "
            f"{', '.join((*kinds, MATCH))}."
        )
    return kinds[settings.image]


def _name(config: Config, task: Task, feature: int) -> str:
    asked = json.dumps([asdict(config.steer), config.seed], sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    place = f"{task.source}.{task.site_source.layer}-to-{task.target}.{task.site_target.layer}"
    return f"{place}-{feature}-{config.steer.image}-{digest}"


# ---------------------------------------------------------------- B


class _Target:
    """B: what it reads, and the program that writes on."""

    def __init__(self, config: Config, work: Workdir, store: Store, task: Task):
        settings, path = config.steer, store.paths[store.models.index(task.target)]
        self.store, self.task = store, task
        self.tokenizer = models.load_tokenizer(path)
        self.prompts = read_prompts(config, store, task.target, self.tokenizer)
        lm = models.load(path)
        self.count = new_tokens(settings.tokens, self.prompts, lm.config.context, task.target)
        ends = lm.config.eos_token_id
        ends = ends if isinstance(ends, tuple) else (() if ends is None else (ends,))
        self.ends = {*ends, *self.tokenizer.all_special_ids}
        self.dictionary = dictionaries.load(work.dictionary(task.target, task.site_target))
        self.writer = Writer(
            lm,
            task.site_target,
            batch_size=settings.batch_size,
            dtype=config.extract.matmul_dtype,
        )

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.store.read(self.task.target, self.task.site_target, rows)

    def codes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for block in slices(len(rows)):
            yield encode_rows(self.dictionary, self.read(rows[block]))

    def median_norm(self, rows: np.ndarray) -> float:
        return float(np.median(np.linalg.norm(self.read(rows).astype(np.float32), axis=1)))


# ---------------------------------------------------------------- the texts and what is counted


class _Study:
    """One feature, its directions in B, the texts written with each, and their scores."""

    def __init__(self, config: Config, source: Source, target: _Target, feature: Feature):
        self.config, self.source, self.target, self.feature = config, source, target, feature
        settings = config.steer
        self.samples = settings.samples if settings.temperature else 1
        self.n = len(target.prompts) * self.samples
        self.draws = draw(np.arange(self.n), count=config.evaluation.bootstrap, seed=config.seed)
        strength = feature.strength[:, None]
        match, r = best_matches(target.codes(source.train), strength)
        self.match, self.match_r = int(match[0]), float(r[0])
        native = feature_directions(target.dictionary, match)[0]
        self.image = native if settings.image == MATCH else self._image(strength)
        if not self.image.any():
            raise UserError(
                f"steer.image={settings.image} makes nothing of feature {feature.id}: its image in "
                f"{target.task.target} is zero; choose another feature or image."
            )
        self.directions = {"mapped": self.image, "random": self._random()}
        if settings.image != MATCH:
            self.directions[MATCH] = native

    def _image(self, strength: np.ndarray) -> np.ndarray:
        source = self.source
        m = maps.load(source.task.path(source.work))
        x = source.read(source.train)
        tokens = source.store.tokens(source.task.source, source.train)
        side, one = Side(x, tokens, source.dictionary), np.array([self.feature.id])
        return mapped_directions(m, side, one, strength, seed=self.config.seed)[0]

    def _random(self) -> np.ndarray:
        """A direction for every text, [n, d_model]."""
        key = [self.config.seed, self.feature.id]
        generator = np.random.Generator(np.random.Philox(key=key))
        return generator.normal(size=(self.n, self.target.dictionary.d_model))

    def rows(self) -> Iterator[dict[str, Any]]:
        settings = self.config.steer
        conditions = [("none", 0.0)]
        conditions += [(name, alpha) for alpha in settings.alphas for name in self.directions]
        starts = self._starts(conditions)
        tokens = self.target.writer.write(
            starts,
            count=self.target.count,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self.config.seed,
        )
        texts = self._texts(starts, tokens)
        yield self._about()
        by = {c: texts[i * self.n : (i + 1) * self.n] for i, c in enumerate(conditions)}
        for (name, alpha), own in by.items():
            others = {"more": None, "over_random": None}
            if name != "none":
                others["more"] = by["none", 0.0]
            if name not in ("none", "random"):
                others["over_random"] = by["random", alpha]
            scores = _over(own, others, self.draws)
            yield {"row": "condition", "condition": name, "alpha": alpha} | scores
        for text, (name, alpha) in zip(texts, (c for c in conditions for _ in range(self.n))):
            yield {"row": "text", "condition": name, "alpha": alpha} | text

    def _starts(self, conditions: list[tuple[str, float]]) -> Starts:
        """All texts of the first condition, then of the second, and so on."""
        prompts, settings = self.target.prompts, self.config.steer
        prompt = np.repeat(np.arange(len(prompts)), self.samples)
        tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
        for row, one in zip(tokens, prompts):
            row[: len(one)] = one
        length = np.array([len(one) for one in prompts])[prompt]
        first = length - 1 if settings.positions == "generated" else np.minimum(1, length - 1)
        _, norm = dose_norms(
            settings.norm,
            (self.feature.median_norm, self.target.median_norm(self.source.test)),
            strength=float(self.feature.strength[self.feature.strength > 0].mean()),
            direction=self.feature.direction,
            mapped=self.image,
        )
        shape = (self.n, self.target.dictionary.d_model)
        vectors = [
            np.zeros(shape)
            if name == "none"
            else alpha * norm * np.broadcast_to(normalised(self.directions[name]), shape)
            for name, alpha in conditions
        ]
        times = len(conditions)
        return Starts(
            tokens=np.tile(tokens[prompt], (times, 1)),
            length=np.tile(length, times).astype(np.int32),
            first=np.tile(first, times).astype(np.int32),
            vector=np.concatenate(vectors).astype(np.float32),
            prompt=np.tile(prompt, times).astype(np.int32),
            sample=np.tile(np.arange(self.n) % self.samples, times).astype(np.int32),
        )

    def _texts(self, starts: Starts, tokens: np.ndarray) -> list[dict[str, Any]]:
        """What was written, and what is counted in it; a text ends before the first end mark."""
        whole = np.pad(starts.tokens, ((0, 0), (0, tokens.shape[1])))
        for row, length, new in zip(whole, starts.length, tokens):
            row[length : length + len(new)] = new
        surprise = self.target.writer.surprise(whole).astype(np.float64)
        words, mapped = self.source.words, set(self.feature.mapped)
        pieces = [words.pieces_a[token] for token in self.feature.promoted]
        searched = self.config.steer.search.encode()
        texts = []
        for i, new in enumerate(tokens):
            kept = next((k for k, t in enumerate(new) if t in self.target.ends), len(new))
            scored = min(kept + 1, len(new))  # the end mark is predicted too
            at = starts.length[i] - 1
            written, front = (self._bytes(ids) for ids in (new[:kept], whole[i][: at + 1]))
            per_100 = 100 / max(len(written), 1)
            texts.append(
                {
                    "prompt": int(starts.prompt[i]),
                    "sample": int(starts.sample[i]),
                    "before": front.decode(errors="replace"),
                    "text": written.decode(errors="replace"),
                    "tokens": kept,
                    "token_rate": sum(int(t) in mapped for t in new[:kept]) / max(kept, 1),
                    "piece_rate": per_100 * sum(map(written.count, pieces)),
                    "search_rate": per_100 * written.count(searched) if searched else None,
                    "nll": float(surprise[i, at : at + scored].mean()),
                }
            )
        return texts

    def _bytes(self, ids: np.ndarray) -> bytes:
        words = self.source.words
        known = (i for i in ids if i < len(words.pieces_b) and i not in words.special_b)
        return b"".join(words.pieces_b[i] for i in known)

    def _about(self) -> dict[str, Any]:
        task, feature, words = self.target.task, self.feature, self.source.words
        native = feature_directions(self.target.dictionary, np.array([self.match]))[0]
        asked = asdict(self.config.steer)
        return {
            "row": "feature",
            "source": task.source,
            "target": task.target,
            "site_source": str(task.site_source),
            "site_target": str(task.site_target),
            "feature": feature.id,
            "firings": int((feature.strength > 0).sum()),
            "n_rows": len(feature.strength),
            "promoted_source": [words.text("a", token) for token in feature.promoted],
            "promoted_by": list(feature.promoted.values()),
            "promoted_target": [words.text("b", token) for token in feature.mapped],
            "contexts": feature.contexts,
            "candidates": feature.candidates,
            "match": self.match,
            "match_r": self.match_r,
            "match_cosine": float(normalised(self.image) @ normalised(native)),
            "settings": {name: v for name, v in asked.items() if name not in ("prompts", "image")}
            | {"map": asked["image"]},
            "new_tokens": self.target.count,
            "seed": self.config.seed,
        }


def _over(own: list[dict], others: dict[str, list[dict] | None], draws: Resamples) -> dict:
    """What holds over the texts of a condition, and its paired differences to other texts."""

    def mean(texts: list[dict], rate: str):
        return draws.mean(np.array([text[rate] for text in texts]))

    out: dict[str, Any] = {"n_texts": len(own), "tokens": sum(text["tokens"] for text in own)}
    for rate in RATES:
        known = own[0][rate] is not None
        out |= columns(rate, mean(own, rate) if known else None)
        for name, texts in others.items():
            difference = mean(own, rate) - mean(texts, rate) if known and texts else None
            out |= columns(f"{rate}_{name}", difference)
    return out
