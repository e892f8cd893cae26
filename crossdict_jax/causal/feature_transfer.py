"""The stage that puts single features of one model into the other: feature_causal.jsonl."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from crossdict_jax import maps, results
from crossdict_jax.activations.passages import select_passages, train_mean, whole_spans
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import (
    best_matches,
    feature_directions,
    map_groups,
    mapped_directions,
    strengths,
)
from crossdict_jax.causal.effects import (
    MATCH,
    OTHER_FEATURES,
    Directions,
    Experiment,
    NothingToTest,
    transfer,
)
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.inject import Injector, Positions
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir

ROWS = "feature_causal.jsonl"
SUMMARY = "feature_causal_summary.jsonl"
LEAST_FIRINGS = 4  # positions of the text that is read, for a feature to be drawn
LEAST_DOCUMENTS = 2  # that hold them: fewer give no interval


def transfer_features(config: Config, work: Workdir) -> None:
    """Writes feature_causal.jsonl, a row per tested feature and direction, and their summary.

    Between every two models, at the layer pairs of ``intervention.layers``, features of the source
    are drawn among those that fire (or named). What every map makes of them, and their matches (the
    target's features that correlate best on training rows), are added to the target.
    feature_causal_summary.jsonl has a row per layer pair and map or match. What single features
    gave is kept at once: an interrupted stage goes on behind the last of them.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged; a named feature
        does not exist or never fires. Where there is nothing to test between two models there are
        no rows, and a line says why; so in a run of transcoders, whose features are written
        elsewhere than where maps of activations read.
    """
    settings = config.intervention
    if not settings.features and not settings.feature_ids:
        return
    if config.sae.output_site:
        print("single features: left out, since transcoders read one site and write another")
        return
    store = open_store(work.activations)
    groups = map_groups(config, store, layers=settings.layers, kinds=settings.maps)
    if settings.feature_ids:  # they are the first model's
        groups = [tasks for tasks in groups if tasks[0].source == store.models[0]]
    run, rows, summary = FinishedRun(config, work, store), [], []
    inputs = run.inputs(groups, _read_matches(work) if settings.choose == "matched" else None)
    stage = Stage(work, "transfer_features", files=(ROWS, SUMMARY), inputs=inputs)
    if stage.finished:
        return
    injector = functools.cache(functools.partial(_injector, run))  # one of each model and site
    with progress_bar(desc="feature transfer", unit="feature", total=0) as bar:

        def part(label: str, feature: int, make: Callable[[], dict]) -> dict:
            record = stage.part((label, feature), make)
            bar.update()
            return record

        for task, *tasks in groups:
            try:
                experiment, matches = experiment_of(run, task, tasks, injector)
                bar.total += experiment.tested
                measured = transfer(experiment, config, part=functools.partial(part, task.label))
            except NothingToTest as reason:
                if settings.feature_ids:
                    raise
                print(f"No features of {task.label} are put to work: {reason}", flush=True)
                continue
            ends = (task.source, task.target, str(task.site_source), str(task.site_target))
            pair = dict(zip(results.PAIR, ends))
            rows += [pair | matches[row["feature"]] | row for row in measured[0]]
            summary += [pair | row for row in measured[1]]
    tested = sum(row["n_features"] for row in summary)
    stage.finish({ROWS: rows, SUMMARY: summary}, features=tested)


def passages_of_test(run: FinishedRun, model: str) -> Passages:
    """Returns the test text in which features are tested, as a model reads it."""
    return select_passages(
        run.store, model, documents=run.config.intervention.documents, seed=run.config.seed
    )


def _injector(run: FinishedRun, model: str, site: Site) -> Injector:
    passages = passages_of_test(run, model)
    return Injector(
        run.lm(model),
        site,
        passages.tokens,
        positions_of(run.store, model, passages),
        batch_size=run.config.intervention.batch_size,
        dtype=run.config.extract.matmul_dtype,
    )


def positions_of(store: Store, model: str, passages: Passages) -> Positions:
    """Returns the paired positions of passages: spans reach back to the common end before.

    Continuations reach to the common end behind; a window's last position has none.
    """
    position = store.rows.position[:, store.models.index(model)].astype(np.int64)
    same = store.rows.window[1:] == store.rows.window[:-1]
    behind = position.copy()
    behind[:-1][same] = position[1:][same]
    front = passages.position - position[passages.rows]  # 1 where there is a BOS
    first = whole_spans(store, model, passages).first
    return Positions(passages.window, first, passages.position, behind[passages.rows] + front)


def experiment_of(
    run: FinishedRun, task: Task, tasks: list[Task], injector: Callable[[str, Site], Injector]
) -> tuple[Experiment, dict[int, dict]]:
    """Returns the experiment at one pair of sites, and {feature: the columns about its match}.

    Args:
      task: names the models and sites.
      tasks: the maps whose directions are tested.
      injector: of a model and site.

    Raises:
      NothingToTest: no feature fires often enough.
      UserError: a named feature does not exist or fires too rarely.
    """
    a, b = (task.source, task.site_source), (task.target, task.site_target)
    features, tested = choose_features(run, task)
    rows = passages_of_test(run, task.source).rows
    source, dictionary_b = run.side(*a), run.dictionary(*b)
    trained = strengths(source.dictionary, source.x, features)
    mapped = {}
    for fitted in tasks:
        m, seed = maps.load(fitted.path(run.work)), run.config.seed
        mapped[fitted.kind] = Directions(mapped_directions(m, source, features, trained, seed=seed))
    matches, match_r = best_matches(run.codes(*b), trained)
    mapped[MATCH] = Directions(
        vectors=feature_directions(dictionary_b, matches),
        strength=strengths(dictionary_b, run.store.read(*b, rows), matches),
    )
    experiment = Experiment(
        source=injector(*a),
        target=injector(*b),
        documents=run.store.rows.document[rows],
        features=features,
        tested=tested,
        strength=strengths(source.dictionary, run.store.read(*a, rows), features),
        directions=feature_directions(source.dictionary, features),
        mapped=mapped,
        mean=train_mean(run.store, *b),
        translation=translation(run.tokenizers[task.source], run.tokenizers[task.target]),
    )
    about = zip(features.tolist(), matches.tolist(), match_r.tolist())
    return experiment, {feature: {"match": match, "match_r": r} for feature, match, r in about}


# ---------------------------------------------------------------- which features


def choose_features(run: FinishedRun, task: Task) -> tuple[np.ndarray, int]:
    """Returns (the features to test, then others that lend their directions; how many are tested).

    Raises:
      NothingToTest, UserError: see ``experiment_of``.
    """
    settings, live = run.config.intervention, live_features(run, task)
    generator = np.random.Generator(np.random.Philox(key=run.config.seed))
    drawn = generator.permutation(np.flatnonzero(live))
    site = f"{task.source} at {task.site_source}"
    if settings.feature_ids:
        chosen = np.array(list(dict.fromkeys(settings.feature_ids)))
        asked = f"intervention.feature_ids={','.join(map(str, settings.feature_ids))}"
        for i in chosen:
            if i >= len(live):
                raise UserError(f"{asked}: {site} has features 0 to {len(live) - 1}, not {i}.")
            if not live[i]:
                raise UserError(
                    f"{asked}: feature {i} of {site} is dead, or fires at fewer than "
                    f"{LEAST_FIRINGS} positions of the text that is read; name another or raise "
                    "intervention.documents."
                )
    elif settings.choose == "matched":
        _read_matches(run.work)
        ends = (task.source, task.target, str(task.site_source), str(task.site_target))
        rank = {
            row["feature_source"]: (not row["confirmed"], -row["r_train"])
            for row in results.read_matches(run.work, *ends)
        }
        chosen = np.array([i for i in sorted(rank, key=rank.get) if live[i]], np.int64)
        chosen = chosen[: settings.features]
    else:
        chosen = drawn[: settings.features]
    if not len(chosen):
        raise NothingToTest(
            f"No feature of {site} fires at {LEAST_FIRINGS} positions of {LEAST_DOCUMENTS} "
            "documents; raise intervention.documents or train the dictionary for longer."
        )
    others = drawn[~np.isin(drawn, chosen)]
    lent = max(0, OTHER_FEATURES + 1 - len(chosen))
    return np.concatenate([chosen, others[:lent]]), len(chosen)


def live_features(run: FinishedRun, task: Task) -> np.ndarray:
    """Returns bool [width]: A's features that fire often enough in the test text, and in training.

    Often enough: at LEAST_FIRINGS positions of LEAST_DOCUMENTS documents.
    """
    passages = passages_of_test(run, task.source)
    dictionary = run.dictionary(task.source, task.site_source)
    names, document = np.unique(passages.document, return_inverse=True)
    in_document = np.zeros((len(names), dictionary.width), bool)
    fires = np.zeros(dictionary.width, np.int64)
    for block in slices(len(passages.rows)):
        x = run.store.read(task.source, task.site_source, passages.rows[block])
        f = encode_rows(dictionary, x) > 0
        fires += f.sum(0)
        for i in np.unique(document[block]):
            in_document[i] |= f[document[block] == i].any(0)
    live = (fires >= LEAST_FIRINGS) & (in_document.sum(0) >= LEAST_DOCUMENTS)
    trained = np.isin(np.arange(dictionary.width), run.live(task.source, task.site_source))
    return live & trained


def _read_matches(work: Workdir) -> list[dict]:
    if not work.result("matches.jsonl").exists():
        raise UserError(
            "intervention.choose=matched needs results/matches.jsonl; run evaluate first, or set "
            "intervention.choose=random."
        )
    return results.read(work, "matches.jsonl")
