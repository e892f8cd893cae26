"""Probes: trained on what a map predicts of B's features, used on B's own of other texts."""

from dataclasses import asdict, replace
from functools import cache, partial

import numpy as np

from crossdict_jax import maps, modules, results, stats
from crossdict_jax.causal.directions import MapGroup, map_groups
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.maps import Pairs, Side
from crossdict_jax.models import Site
from crossdict_jax.models.run import pad
from crossdict_jax.report.tables import show
from crossdict_jax.stats import columns
from crossdict_jax.studies.probe import TABLE, labelled, logistic, tables
from crossdict_jax.studies.probe.labelled import Labelled, Split
from crossdict_jax.studies.reading import Reading, read_texts
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir, say

DRAWS = 5  # of the examples, averaged


def run(config: Config, work: Workdir) -> None:
    """Writes probe.jsonl, the accuracy of labels from B's features, and prints it.

    Raises:
      UserError: the texts are missing or too few; a file of the run is missing or damaged.
    """
    settings = config.probe
    texts = labelled.read_labelled(settings.source, text=settings.text, label=settings.label)
    finished, layers = FinishedRun(config, work), config.intervention.layers
    asked = {"layers": layers, "kinds": settings.maps, "of_tokens": True}
    groups = map_groups(config, finished.store, **asked)
    question = [
        asdict(replace(settings, source="")),
        texts.texts,
        texts.labels.tolist(),
        texts.classes,
    ]
    inputs = finished.inputs([task for group in groups for task in group.tasks], question)
    stage = Stage(work, "probe", files=(TABLE.file,), inputs=inputs)
    if not stage.finished:
        reading, reasons = read(finished, texts)
        left = f"{len(reading.kept)} of {len(texts.texts)} texts are left ({reasons})"
        say(f"probe: {left}")
        asked = {"examples": settings.examples, "seed": config.seed, "left": left}
        examples = labelled.split(texts.labels[reading.kept], texts.classes, **asked)
        side, rows = cache(partial(side_of, finished, reading)), []
        for group in progress_bar(groups, desc="probes", unit="direction"):
            head = results.pair_columns(group) | {"n_classes": len(texts.classes)}
            make = partial(_direction, finished, reading, side, examples, group)
            rows += [head | row for row in stage.part((group.label,), make)]
        stage.finish({TABLE.file: rows}, texts=len(texts.texts))
    show(tables(results.read(work, TABLE.file)))


def read(run: FinishedRun, texts: Labelled) -> tuple[Reading, str]:
    """Returns what all models read, and in words how many texts were left out and why."""
    reading = read_texts(run, texts.texts)
    paired = np.unique(reading.text)
    reasons = (
        f"{texts.duplicates} duplicates, {reading.too_long} too long, {reading.not_rebuilt} not "
        f"rebuilt, {len(reading.kept) - len(paired)} unpaired"
    )
    reading = reading.take(paired)
    last = np.flatnonzero(np.diff(reading.text, append=-1))  # what a text says stands at its end
    return reading.take_rows(last), reasons


def side_of(run: FinishedRun, reading: Reading, model: str, site: Site) -> Side:
    """Returns a model's side of the rows of all texts."""
    passages = reading.passages[model]
    x = run.runner(model).read_at(passages, [site])[0]
    tokens = pad(passages.tokens)[passages.window, passages.position]
    return Side(x, tokens, run.dictionary(model, site))


def _direction(
    run: FinishedRun, reading: Reading, side, examples: Split, group: MapGroup
) -> list[dict]:
    """The rows of one direction, of every probe at every number of labelled examples."""
    size = run.config.evaluation.batch_size
    pairs = Pairs(*(side(*end) for end in group.ends), reading.text)
    own_a, own_b = (
        modules.over_rows(s.dictionary, s.x, method="encode", size=size)
        for s in (pairs.source, pairs.target)
    )
    ends = pairs.target.dictionary, pairs.source.dictionary
    features = {  # by probe: of training texts, of test texts, each [texts, d]
        task.kind: (maps.predict(maps.load(task.path(run.work), *ends), pairs, size), own_b)
        for task in group.tasks
    }
    tokens = reading.passages[group.source].tokens
    n_tokens = 1 + max(int(text.max()) for text in tokens)
    counts = np.stack([np.bincount(text, minlength=n_tokens) for text in tokens])
    counts = counts[:, counts.any(0)].astype(np.float32)  # [texts, tokens that occur]
    features |= {"own": (own_b, own_b), "source": (own_a, own_a), "tokens": (counts, counts)}
    asked = sorted(run.config.probe.examples)
    return [row for n in asked for row in probe_rows(features, examples, n, run.config)]


def probe_rows(features: dict, examples: Split, n: int, config: Config) -> list[dict]:
    """Returns the rows of n labelled examples; features are (training, test) by probe."""
    labels, test, seed = examples.labels, examples.test, config.seed
    right = {name: np.zeros((2, len(test))) for name in features}  # for true and shuffled labels
    right["majority"] = np.zeros((1, len(test)))
    for draw in range(DRAWS):
        rows = examples.examples(n, draw)
        true = labels[rows]
        taught = np.stack([true, stats.generator(seed + 1, draw).permutation(true)])
        for name, (trained_on, used_on) in features.items():
            probes = logistic.train(trained_on[rows], taught, classes=labels.max() + 1, seed=seed)
            right[name] += np.stack([probe(used_on[test]) == labels[test] for probe in probes])
        right["majority"] += labels[test] == np.bincount(true).argmax()
    draws = stats.draw(np.arange(len(test)), count=config.evaluation.bootstrap, seed=seed)
    accuracy = {name: draws.mean(hits[0] / DRAWS) for name, hits in right.items()}
    return [
        {
            "probe": name,
            "n": n,
            "n_texts": len(test),
            **columns("accuracy", accuracy[name]),
            "accuracy_shuffled": float(hits[1].mean() / DRAWS) if len(hits) > 1 else None,
            **columns("lead_tokens", accuracy[name] - accuracy["tokens"]),
            **columns("behind_own", accuracy["own"] - accuracy[name]),
        }
        for name, hits in right.items()
    ]
