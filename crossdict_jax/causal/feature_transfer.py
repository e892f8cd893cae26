"""The stage that adds single features of one model to the other: feature_causal.jsonl."""

import numpy as np

from crossdict_jax import results, stats
from crossdict_jax.causal import directions, effects
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import Config
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError
from crossdict_jax.results import pair_columns
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir, say

ROWS = "feature_causal.jsonl"
SUMMARY = "feature_causal_summary.jsonl"
LEAST_FIRINGS = 4  # positions in the text, for a feature to be drawn
LEAST_DOCUMENTS = 2  # that hold them: fewer give no interval


def transfer_features(config: Config, work: Workdir) -> None:
    """Writes feature_causal.jsonl, a row per tested feature and direction, and their summary.

    Features of the source that fire are drawn (or named); their mapped directions and matches are
    added to the target. Where there is nothing to test (as with transcoders) a line says why.

    Raises:
      UserError: a file of the run is missing or damaged; a named feature cannot be tested.
    """
    settings = config.intervention
    if not settings.features and not settings.feature_ids:
        return
    if config.sae.output_site:
        say("single features: left out, since transcoders read one site and write another")
        return
    run, rows, summary = FinishedRun(config, work), [], []
    groups = directions.map_groups(config, run.store, layers=settings.layers, kinds=settings.maps)
    if settings.feature_ids:  # of the first model
        groups = [group for group in groups if group.source == run.store.models[0]]
    chosen_from = None
    if settings.choose == "matched":
        if not work.result("matches.jsonl").exists():
            raise UserError(
                "intervention.choose=matched needs results/matches.jsonl; run evaluate first, or "
                "set intervention.choose=random."
            )
        chosen_from = results.read(work, "matches.jsonl")
    inputs = run.inputs([task for group in groups for task in group.tasks], chosen_from)
    stage = Stage(work, "transfer_features", files=(ROWS, SUMMARY), inputs=inputs)
    if stage.finished:
        return
    for group in progress_bar(groups, desc="feature transfer", unit="direction"):
        try:
            experiment, matches = experiment_of(run, group)
            kept = lambda i, make, label=group.label: stage.part((label, i), make)  # noqa: E731
            of_features, of_directions = effects.transfer(experiment, config, part=kept)
        except effects.NothingToTest as reason:
            if settings.feature_ids:
                raise
            say(f"No features of {group.label} are put to work: {reason}")
            continue
        rows += [pair_columns(group) | matches[row["feature"]] | row for row in of_features]
        summary += [pair_columns(group) | row for row in of_directions]
    files = {ROWS: rows, SUMMARY: summary}
    tested = sum(row["n_features"] for row in summary if row["direction"] == effects.MATCH)
    stage.finish(files, features=tested)


def experiment_of(
    run: FinishedRun, group: directions.MapGroup
) -> tuple[effects.Experiment, dict[int, dict]]:
    """Returns the experiment at one pair of sites, and {feature: the columns about its match}.

    NothingToTest where no feature fires often enough, UserError for a named feature.
    """
    a, b = group.ends
    features, tested = choose_features(run, group)
    rows, source, target = run.passages(group.source).rows, run.dictionary(*a), run.dictionary(*b)
    vectors, matches, match_r = run.map_features(group, features)
    mapped = {kind: effects.Directions(of_map) for kind, of_map in vectors.items()}
    in_b = directions.strengths(target, run.store.read(*b, rows), matches)
    mapped[effects.MATCH] = effects.Directions(decoder_rows(target, matches), in_b)
    experiment = effects.Experiment(
        source=run.at_site(*a),
        target=run.at_site(*b),
        documents=run.store.rows.document[rows],
        features=features,
        tested=tested,
        strength=directions.strengths(source, run.store.read(*a, rows), features),
        directions=decoder_rows(source, features),
        mapped=mapped,
        translation=translation(run.tokenizers[group.source], run.tokenizers[group.target]),
    )
    about = zip(features.tolist(), matches.tolist(), match_r.tolist())
    return experiment, {i: {"match": match, "match_r": r} for i, match, r in about}


def choose_features(run: FinishedRun, group: directions.MapGroup) -> tuple[np.ndarray, int]:
    """Returns (features to test, then others that lend their directions; how many are tested).

    All fire on training rows, and often enough in the test text.
    """
    settings, end, passages = run.config.intervention, group.ends[0], run.passages(group.source)
    names, document = np.unique(passages.document, return_inverse=True)
    firings = np.zeros((len(names), run.dictionary(*end).width), int)  # by document and feature
    start = 0
    for f in run.codes(*end, passages.rows):
        row, feature = np.nonzero(f > 0)
        np.add.at(firings, (document[start + row], feature), 1)
        start += len(f)
    live = (firings.sum(0) >= LEAST_FIRINGS) & ((firings > 0).sum(0) >= LEAST_DOCUMENTS)
    live &= np.isin(np.arange(len(live)), run.live(*end))
    drawn = stats.generator(run.config.seed).permutation(np.flatnonzero(live))
    site = f"{group.source} at {group.site_source}"
    more = "intervention.documents, or text.documents where the run has no more for the test"
    if settings.feature_ids:
        chosen = np.array(list(dict.fromkeys(settings.feature_ids)))
        asked = f"intervention.feature_ids={','.join(map(str, settings.feature_ids))}"
        for i in chosen:
            if i >= len(live):
                raise UserError(f"{asked}: {site} has features 0 to {len(live) - 1}, not {i}.")
            if not live[i]:
                raise UserError(
                    f"{asked}: feature {i} of {site} is dead, or fires at fewer than "
                    f"{LEAST_FIRINGS} positions or {LEAST_DOCUMENTS} documents of the text that "
                    f"is read ({len(names)} documents); name another or raise {more}."
                )
    elif settings.choose == "matched":
        rank = {
            row["feature_source"]: (not row["confirmed"], -row["r_train"])
            for row in results.read_matches(run.work, *pair_columns(group).values())
        }
        chosen = [i for i in sorted(rank, key=rank.get) if live[i]]
        chosen = np.array(chosen[: settings.features], np.int64)
    else:
        chosen = drawn[: settings.features]
    if not len(chosen):
        raise effects.NothingToTest(
            f"No feature of {site} fires at {LEAST_FIRINGS} positions of {LEAST_DOCUMENTS} "
            f"documents (of {len(names)} that are read); raise {more}, or train the dictionary "
            "for longer."
        )
    others = drawn[~np.isin(drawn, chosen)]
    lent = max(0, effects.controls_at(run.config.evaluation.fdr) + 1 - len(chosen))
    return np.concatenate([chosen, others[:lent]]), len(chosen)
