"""The question that launch.steer asks: what does B write with a feature of A put into it?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import numpy as np

from crossdict_jax import maps, results
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import best_matches, feature_directions, mapped_directions
from crossdict_jax.causal.effects import MATCH, dose_norms, normalised
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import Translation, translation
from crossdict_jax.config import Config, refuse_transcoders
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models.run import Starts
from crossdict_jax.report.tables import show
from crossdict_jax.stats import Resamples, columns, draw
from crossdict_jax.studies.steering.generation import Writer
from crossdict_jax.studies.steering.prompts import new_tokens, read_prompts
from crossdict_jax.studies.steering.section import answers, facts, sentence, side_by_side, tables
from crossdict_jax.studies.steering.source_feature import Feature, Source, choose
from crossdict_jax.training.stage import digest, timed
from crossdict_jax.workdir import Workdir

FOLDER = "steering"  # of results/
RATES = ("token_rate", "piece_rate", "search_rate", "nll")


def run(config: Config, work: Workdir) -> None:
    """Writes the texts and their rates (see ``steer``), and prints them side by side."""
    (answer,) = answers(results.read(work, f"{FOLDER}/{steer(config, work)}.jsonl"))
    print("\n".join([answer.title, *(f"{key}: {words}" for key, words in facts(answer))]))
    show([side_by_side(answer, answer.doses[-1]), *tables(answer)])
    print(sentence(answer))


def steer(config: Config, work: Workdir) -> str:
    """Writes results/steering/NAME.jsonl and returns NAME, which speaks of what was asked.

    B (``steer.target``) continues prompts; the mapped direction of a feature of A is added to its
    activations at the target's layer, from the last token of the prompt on, so that every new token
    is predicted under it. Beside it, with the same random numbers and the same norm: no edit, a
    random direction (another one for every text), and the feature of B that correlates best with
    A's on training rows (its match).

    Raises:
      UserError: anything that was asked for does not exist, is dead, or does not fit, or the run
        holds transcoders.
    """
    settings = config.steer
    if (settings.feature < 0) == (not settings.search):
        raise UserError(
            "steer.feature and steer.search: give one of them, as in --config.steer.feature=17 or "
            "--config.steer.search=himself."
        )
    refuse_transcoders(config, "Steering")
    finished = FinishedRun(config, work, open_store(work.activations))
    task = chosen_task(config, finished.store)
    lm, tokenizer = finished.lm(task.target), finished.tokenizers[task.target]
    with timed(work, "steer") as figures:
        prompts = read_prompts(config, finished.store, task.target, tokenizer)
        count = new_tokens(settings.tokens, prompts, lm.config.context, task.target)
        words = translation(finished.tokenizers[task.source], tokenizer)
        source = Source(finished, task, words)
        feature = choose(source)
        samples = settings.samples if settings.temperature else 1
        directions, about = edits(source, feature, n=len(prompts) * samples)
        norm = dose_norm(source, feature, directions["mapped"])
        doses = [("none", 0.0), *((name, a) for a in settings.alphas for name in directions)]
        nothing = np.zeros(lm.config.d_model)
        vectors = [a * norm * normalised(directions.get(name, nothing)) for name, a in doses]
        starts = make_starts(prompts, samples, vectors, lm.config.d_model)
        writer = Writer(lm, task.site_target, dtype=config.extract.matmul_dtype)
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        tokens = writer.write(starts, count=count, seed=config.seed, **sampling)
        ends = np.atleast_1d([] if lm.config.eos_token_id is None else lm.config.eos_token_id)
        ends = {*ends.tolist(), *tokenizer.all_special_ids}
        texts = score_texts(writer, starts, tokens, feature, words, settings.search, ends)
        of_dose = np.array_split(np.array(texts, object), len(doses))
        by = dict(zip(doses, map(list, of_dose)))
        resamples = draw(
            np.arange(len(by["none", 0.0])), count=config.evaluation.bootstrap, seed=config.seed
        )
        rows = [about | {"new_tokens": count}]
        rows += [condition_row(by, name, alpha, resamples) for name, alpha in doses]
        for (name, alpha), group in by.items():
            rows += [{"row": "text", "condition": name, "alpha": alpha} | text for text in group]
        pair = f"{task.source}.{task.site_source.layer}-to-{task.target}.{task.site_target.layer}"
        asked = digest([asdict(settings), config.seed])[:8]
        name = f"{pair}-{feature.id}-{settings.map}-{asked}"
        results.write(work, f"{FOLDER}/{name}.jsonl", rows)
        figures["tokens"] = tokens.size
    return name


def chosen_task(config: Config, store: Store) -> Task:
    """Returns the map whose direction is asked for; for the match any map of the layer pair.

    Raises:
      UserError: the run has no such model, layer pair or map.
    """
    settings = config.steer
    source = settings.source or store.models[0]
    target = settings.target or next(m for m in store.models if m != source)
    for name, model in (("source", source), ("target", target)):
        if model not in store.models:
            names = ", ".join(store.models)
            raise UserError(f"steer.{name}={model} is no model of this run; use one of {names}.")
    if source == target:
        raise UserError(f"steer.source and steer.target are both {source}; name two models.")
    pairs: dict[str, list[Task]] = {}
    for task in maps.tasks(config, store):
        if (task.source, task.target, task.pairing) == (source, target, "aligned"):
            layers = f"{task.site_source.layer}:{task.site_target.layer}"
            pairs.setdefault(layers, []).append(task)
    asked = settings.layer_pair or list(pairs)[len(pairs) // 2]
    if asked not in pairs:
        raise UserError(
            f"steer.layer_pair={asked} is no layer pair from {source} to {target} in this run; use "
            f"one of {', '.join(pairs)}."
        )
    if settings.map == MATCH:
        return pairs[asked][0]
    kinds = {t.kind: t for t in pairs[asked] if map_class(t.kind).reads != "tokens"}
    if settings.map not in kinds:
        raise UserError(
            f"steer.map={settings.map} maps no feature in this run; use one of "
            f"{', '.join((*kinds, MATCH))}."
        )
    return kinds[settings.map]


# ---------------------------------------------------------------- what is put in


def edits(source: Source, feature: Feature, n: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns {edit: directions [d_b], random ones [n, d_b]}, and the row of the feature."""
    run, task, words = source.run, source.task, source.words
    settings = run.config.steer
    strength = feature.strength[:, None]
    dictionary = run.dictionary(task.target, task.site_target)
    match, r = best_matches(run.codes(task.target, task.site_target), strength)
    of_match = mapped = feature_directions(dictionary, match)[0]
    if settings.map != MATCH:
        m, side = maps.load(task.path(run.work)), run.side(task.source, task.site_source)
        ids = np.array([feature.id])
        mapped = mapped_directions(m, side, ids, strength, seed=run.config.seed)[0]
    if not mapped.any():
        raise UserError(
            f"steer.map={settings.map} makes nothing of feature {feature.id}: its direction in "
            f"{task.target} is zero; choose another feature or map."
        )
    key = [run.config.seed, feature.id]
    generator = np.random.Generator(np.random.Philox(key=key))
    directions = {"mapped": mapped, "random": generator.normal(size=(n, dictionary.d_model))}
    if settings.map != MATCH:
        directions[MATCH] = of_match
    pair = (task.source, task.target, str(task.site_source), str(task.site_target))
    return directions, {
        "row": "feature",
        **dict(zip(results.PAIR, pair)),
        "feature": feature.id,
        "firings": int((feature.strength > 0).sum()),
        "n_rows": len(feature.strength),
        "promoted_source": [words.text("a", token) for token in feature.promoted],
        "promoted_by": list(feature.promoted.values()),
        "promoted_target": [words.text("b", token) for token in feature.mapped],
        "contexts": feature.contexts,
        "candidates": feature.candidates,
        "match": int(match[0]),
        "match_r": float(r[0]),
        "match_cosine": float(normalised(mapped) @ normalised(of_match)),
        "settings": {key: v for key, v in asdict(settings).items() if key != "prompts"},
        "seed": run.config.seed,
    }


def dose_norm(source: Source, feature: Feature, mapped: np.ndarray) -> float:
    """Returns the norm of what a dose of 1 adds to B."""
    task = source.task
    x = source.run.store.read(task.target, task.site_target, source.test)
    median = float(np.median(np.linalg.norm(x.astype(np.float32), axis=1)))
    _, norm = dose_norms(
        source.run.config.steer.norm,
        (feature.median_norm, median),
        strength=float(feature.strength[feature.strength > 0].mean()),
        direction=feature.direction,
        mapped=mapped,
    )
    return norm


def make_starts(
    prompts: list[np.ndarray], samples: int, vectors: list[np.ndarray], d_model: int
) -> Starts:
    """Returns all texts under the first vector, then under the second, and so on.

    Args:
      samples: texts of every prompt.
      vectors: each what all texts share [d_model], or another for each [texts, d_model].
    """
    prompt = np.repeat(np.arange(len(prompts)), samples)
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, text in zip(tokens, prompts):
        row[: len(text)] = text
    length = np.array([len(text) for text in prompts])[prompt]
    n, times = len(prompt), len(vectors)
    return Starts(
        tokens=np.tile(tokens[prompt], (times, 1)),
        length=np.tile(length, times).astype(np.int32),
        vector=np.concatenate([np.broadcast_to(v, (n, d_model)) for v in vectors]).astype(
            "float32"
        ),
        prompt=np.tile(prompt, times).astype(np.int32),
        sample=np.tile(np.arange(n) % samples, times).astype(np.int32),
    )


# ---------------------------------------------------------------- what is counted


def score_texts(
    writer: Writer,
    starts: Starts,
    tokens: np.ndarray,
    feature: Feature,
    words: Translation,
    searched: str,
    ends: Collection[int],
) -> list[dict[str, Any]]:
    """Returns what was written, and what is counted in it, a dict for each text.

    Args:
      tokens: int32 [n, count], the new ones.
      ends: tokens that end a text: what stands from the first of them on is not counted.
    """
    text_tokens = np.pad(starts.tokens, ((0, 0), (0, tokens.shape[1])))
    for row, length, new in zip(text_tokens, starts.length, tokens):
        row[length : length + len(new)] = new
    surprise = writer.surprise(text_tokens).astype(np.float64)
    pieces = [words.pieces_a[token] for token in feature.promoted]

    def as_bytes(ids: np.ndarray) -> bytes:
        spelled = (i for i in ids if i < len(words.pieces_b) and i not in words.special_b)
        return b"".join(words.pieces_b[i] for i in spelled)

    texts = []
    for i, new in enumerate(tokens):
        kept = next((k for k, t in enumerate(new) if t in ends), len(new))
        scored = min(kept + 1, len(new))  # the end mark is predicted too
        start = starts.length[i] - 1
        written, before = as_bytes(new[:kept]), as_bytes(text_tokens[i][: start + 1])
        per_100 = 100 / max(len(written), 1)
        texts.append(
            {
                "prompt": int(starts.prompt[i]),
                "sample": int(starts.sample[i]),
                "before": before.decode(errors="replace"),
                "text": written.decode(errors="replace"),
                "tokens": kept,
                "token_rate": sum(int(t) in feature.mapped for t in new[:kept]) / max(kept, 1),
                "piece_rate": per_100 * sum(map(written.count, pieces)),
                "search_rate": per_100 * written.count(searched.encode()) if searched else None,
                "nll": float(surprise[i, start : start + scored].mean()),
            }
        )
    return texts


def condition_row(by: dict, name: str, alpha: float, draws: Resamples) -> dict[str, Any]:
    """Returns what holds over the texts of an edit, and its paired differences to other texts.

    Args:
      by: {(edit, dose): its texts}.
    """
    texts = by[name, alpha]
    others = {
        "more": by["none", 0.0] if name != "none" else None,
        "over_random": by["random", alpha] if name not in ("none", "random") else None,
    }
    row = {"row": "condition", "condition": name, "alpha": alpha, "n_texts": len(texts)}
    row["tokens"] = sum(text["tokens"] for text in texts)
    for rate in RATES:
        counted = texts[0][rate] is not None
        mean = draws.mean(np.array([text[rate] for text in texts])) if counted else None
        row |= columns(rate, mean)
        for difference, of_others in others.items():
            paired = None
            if counted and of_others:
                paired = mean - draws.mean(np.array([text[rate] for text in of_others]))
            row |= columns(f"{rate}_{difference}", paired)
    return row
