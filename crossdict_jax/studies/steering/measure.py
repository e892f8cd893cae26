"""Steering: what does B write with a feature of A added to it?"""

from dataclasses import asdict, replace

import numpy as np

from crossdict_jax import results, stats
from crossdict_jax.activations.pairing import normalize
from crossdict_jax.activations.store import Store
from crossdict_jax.causal.directions import MapGroup, map_groups
from crossdict_jax.causal.effects import MATCH, dose_norms
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import Config, refuse_transcoders
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError
from crossdict_jax.models.run import Starts, pad, token_losses
from crossdict_jax.report.tables import show
from crossdict_jax.stats import Estimate, Resamples, columns, normalised
from crossdict_jax.studies.steering import (
    RATES,
    TOP_P,
    answers,
    facts,
    sentence,
    side_by_side,
    tables,
)
from crossdict_jax.studies.steering.prompts import new_tokens, read_prompts
from crossdict_jax.studies.steering.source_feature import Feature, Source, choose
from crossdict_jax.training.stage import digest, timed
from crossdict_jax.workdir import Workdir, check_space, write_json

FOLDER = "steering"  # of results/
SHOWN = 3  # strongest contexts of the feature


def run(config: Config, work: Workdir) -> None:
    """Writes the texts and their rates (see ``steer``), and prints them side by side."""
    for answer in answers(results.read(work, f"{FOLDER}/{steer(config, work)}.jsonl")):
        print(answer.title, *(f"{key}: {words}" for key, words in facts(answer)), sep="\n")
        show([side_by_side(answer, answer.doses[-1]), *tables(answer)])
        print(sentence(answer))


def steer(config: Config, work: Workdir) -> str:
    """Writes results/steering/NAME.jsonl and returns NAME, made of the settings.

    B (``steer.target``) continues prompts; a mapped feature direction of A is added to its
    activations from the prompt's last token on. Controls with the same random numbers and norm: no
    edit, a random direction per text, and the feature of B that correlates best on training rows.

    Raises:
      UserError: what was asked for does not exist, is dead, or does not fit; transcoders.
    """
    settings, seed = config.steer, config.seed
    if (settings.feature < 0) == (not settings.search):
        raise UserError(
            "steer.feature and steer.search: give one of them, as in --config.steer.feature=17 or "
            "--config.steer.search=himself."
        )
    refuse_transcoders(config, "Steering")
    finished = FinishedRun(config, work)
    group = chosen_maps(config, finished.store)
    runner, tokenizer = finished.runner(group.target), finished.tokenizers[group.target]
    check_space(work.result(FOLDER))  # before any work
    with timed(work, "steer") as figures:
        prompts = read_prompts(config, finished.store, group.target, tokenizer)
        count = new_tokens(settings.tokens, prompts, runner.config.context, group.target)
        source = Source(finished, group, translation(finished.tokenizers[group.source], tokenizer))
        feature = choose(source)
        samples = settings.samples if settings.temperature else 1
        n = len(prompts) * samples
        directions, about = edits(source, feature, n=n)
        doses = [("none", 0.0), *((name, a) for a in settings.alphas for name in directions)]
        nothing = np.zeros(runner.config.d_model)
        vectors = [alpha * directions.get(name, nothing) for name, alpha in doses]
        starts = make_starts(prompts, samples, vectors)
        sampling = {"temperature": settings.temperature, "top_p": TOP_P, "count": count}
        tokens = runner.generate(starts, group.site_target, seed=seed, **sampling)
        texts = score_texts(source, feature, starts, tokens)
        by = {dose: texts[i * n : (i + 1) * n] for i, dose in enumerate(doses)}
        draws = stats.draw(np.arange(n), count=config.evaluation.bootstrap, seed=seed)
        rows = [about | {"new_tokens": count}]
        rows += [condition_row(by, *dose, draws) for dose in doses]
        for (name, alpha), of_dose in by.items():
            rows += [{"row": "text", "condition": name, "alpha": alpha} | text for text in of_dose]
        ends = "-to-".join(f"{model}.{site.layer}" for model, site in group.ends)
        asked = digest([asdict(settings), seed])[:8]
        name = f"{ends}-{feature.id}-{settings.map}-{asked}"
        results.write(work, f"{FOLDER}/{name}.jsonl", rows)
        write_json(work.result(f"{FOLDER}/{name}.inputs.json"), finished.inputs(group.tasks))
        figures["tokens"] = tokens.size
    return name


def chosen_maps(config: Config, store: Store) -> MapGroup:
    """Returns the chosen layer pair with the chosen map, or with none for the match."""
    settings, names = config.steer, ", ".join(store.models)
    source = settings.source or store.models[0]
    target = settings.target or next(m for m in store.models if m != source)
    for name, model in (("source", source), ("target", target)):
        if model not in store.models:
            raise UserError(f"steer.{name}={model} is no model of this run; use one of {names}.")
    if source == target:
        raise UserError(f"steer.source and steer.target are both {source}; name two models.")
    groups = {
        f"{group.site_source.layer}:{group.site_target.layer}": group
        for group in map_groups(config, store, layers="all", kinds=("all",))
        if (group.source, group.target) == (source, target)
    }
    asked = settings.layer_pair or list(groups)[len(groups) // 2]
    if asked not in groups:
        raise UserError(
            f"steer.layer_pair={asked} is no layer pair from {source} to {target} in this run; use "
            f"one of {', '.join(groups)}."
        )
    kinds = {task.kind: [task] for task in groups[asked].tasks} | {MATCH: []}
    if settings.map not in kinds:
        raise UserError(
            f"steer.map={settings.map} maps no feature in this run; use one of {', '.join(kinds)}."
        )
    return replace(groups[asked], tasks=kinds[settings.map])


def edits(source: Source, feature: Feature, n: int) -> tuple[dict[str, np.ndarray], dict]:
    """Returns {edit: what dose 1 adds, [d_b] or per text [n, d_b]}, and the first row."""
    run, group, words = source.run, source.group, source.words
    settings, seed, b = run.config.steer, run.config.seed, group.ends[1]
    vectors, match, r = run.map_features(group, np.array([feature.id]))
    of_match = decoder_rows(run.dictionary(*b), match)[0]
    mapped = vectors[settings.map][0] if vectors else of_match
    if not mapped.any():
        raise UserError(
            f"steer.map={settings.map} makes nothing of feature {feature.id}: its direction in "
            f"{group.target} is zero; choose another feature or map."
        )
    random = stats.generator(seed, feature.id).normal(size=(n, len(mapped)))
    directions = {"mapped": mapped, "random": random}
    if settings.map != MATCH:
        directions[MATCH] = of_match
    x = run.store.read(*b, run.rows("test")).astype(np.float32)
    medians = feature.median_norm, float(np.median(np.linalg.norm(x, axis=1)))
    strength, rows = feature.strength, run.rows("train")
    mean = strength[strength > 0].mean()
    added = (float(mean * np.linalg.norm(v)) for v in (feature.direction, mapped))
    _, norm = dose_norms(settings.norm, medians, *added)
    strongest = (i for i in np.argsort(-strength, kind="stable")[:SHOWN] if strength[i] > 0)
    about = {
        "row": "feature",
        **results.pair_columns(group),
        "feature": feature.id,
        "firings": int((strength > 0).sum()),
        "n_rows": len(rows),
        "promoted_source": [words.text("a", token) for token in feature.promoted],
        "promoted_target": [words.text("b", token) for token in feature.mapped],
        "contexts": [source.contexts.snippet(rows[i]) for i in strongest],
        "candidates": feature.candidates,
        "match": int(match[0]),
        "match_r": float(r[0]),
        "match_cosine": float(normalised(mapped) @ normalised(of_match)),
        "settings": {key: v for key, v in asdict(settings).items() if key != "prompts"},
        "seed": seed,
    }
    return {name: norm * normalised(vectors) for name, vectors in directions.items()}, about


def make_starts(prompts: list[np.ndarray], samples: int, vectors: list[np.ndarray]) -> Starts:
    """Returns ``samples`` texts of every prompt under the first vector, then the second, and so on.

    A vector is [d_model] for all texts, or [texts, d_model].
    """
    n = len(prompts) * samples  # texts under each vector
    index = np.arange(len(vectors) * n, dtype=np.int32) % n
    prompt = index // samples
    vectors = [np.broadcast_to(vector, (n, vector.shape[-1])) for vector in vectors]
    return Starts(
        tokens=pad(prompts)[prompt],
        length=np.array(list(map(len, prompts)), np.int32)[prompt],
        vector=np.concatenate(vectors).astype(np.float32),
        prompt=prompt,
        sample=index % samples,
    )


def score_texts(source: Source, feature: Feature, starts: Starts, tokens: np.ndarray) -> list[dict]:
    """Returns each text of tokens int32 [n, count] with its counts.

    Nothing behind a token that ends a text is counted.
    """
    run, target, words = source.run, source.group.target, source.words
    runner, searched = run.runner(target), normalize(run.config.steer.search).encode()
    end = runner.config.eos_token_id
    ends = {*np.atleast_1d([] if end is None else end), *run.tokenizers[target].all_special_ids}
    before = [row[:length] for row, length in zip(starts.tokens, starts.length)]
    sequences = list(map(np.append, before, tokens))
    losses = runner.run(token_losses, pad(sequences)).astype(np.float64)

    def as_bytes(ids: np.ndarray) -> bytes:
        spelled = (i for i in ids if i < len(words.pieces_b) and i not in words.special_b)
        return b"".join(words.pieces_b[i] for i in spelled)

    texts = []
    for i, (prompt, new) in enumerate(zip(before, tokens)):
        kept = next((k for k, t in enumerate(new) if t in ends), len(new))
        until = min(kept + 1, len(new))  # the end mark is predicted too
        scored = losses[i, len(prompt) - 1 :][:until]
        written, hits = as_bytes(new[:kept]), sum(int(t) in feature.mapped for t in new[:kept])
        per_100_bytes = 100 * written.count(searched) / max(len(written), 1)
        text = {
            "prompt": int(starts.prompt[i]),
            "sample": int(starts.sample[i]),
            "before": as_bytes(prompt).decode(errors="replace"),
            "text": written.decode(errors="replace"),
            "tokens": kept,
            "token_rate": hits / max(kept, 1),
            "search_rate": per_100_bytes if searched else None,
            "nll": float(scored.mean()),
        }
        texts.append(text)
    return texts


def condition_row(by: dict, name: str, alpha: float, draws: Resamples) -> dict:
    """Returns an edit's means over texts, and paired differences to the other edits."""
    others = {"more": ("none", 0.0), "over_random": ("random", alpha)}
    texts = by[name, alpha]

    def mean(edit: tuple[str, float], rate: str) -> Estimate | None:
        values = [text[rate] for text in by[edit]]
        return None if values[0] is None else draws.mean(np.array(values))

    row = {"row": "condition", "condition": name, "alpha": alpha, "n_texts": len(texts)}
    row["tokens"] = sum(text["tokens"] for text in texts)
    for rate in RATES:
        row |= columns(rate, itself := mean((name, alpha), rate))
        for end, other in others.items():
            differs = itself and name not in ("none", other[0])
            row |= columns(f"{rate}_{end}", itself - mean(other, rate) if differs else None)
    return row
