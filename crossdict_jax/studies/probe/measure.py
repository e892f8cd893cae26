"""The stage about probes: what was learned of A's features from labels, used on B without any.

A rung says what B's features would be where A's are known. A probe is trained on that picture of n
labelled texts, which B need not have read, and used on B's own features of other texts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from crossdict_jax import maps, modules, results, stats
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import map_groups
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.inputs import digest_of, digests
from crossdict_jax.causal.progress import Progress
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Pairs, Side, Task
from crossdict_jax.models import Site
from crossdict_jax.report.tables import show
from crossdict_jax.stats import columns
from crossdict_jax.studies.probe import labelled, logistic
from crossdict_jax.studies.probe.labelled import Labelled, Read, pooled, read_labelled
from crossdict_jax.studies.probe.section import tables
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

ROWS = "probe.jsonl"
STAMP = "probe.inputs.json"
PROGRESS = "probe.progress.jsonl"
SOURCE, NATIVE, TOKENS, MAJORITY = "source", "own", "tokens", "majority"


def run(config: Config, work: Workdir) -> None:
    """Measures, and prints what came out."""
    measure_probes(config, work)
    show(tables(results.read(work, ROWS)))


def measure_probes(config: Config, work: Workdir) -> None:
    """Writes probe.jsonl: how well labels are told from B's features, by the number of examples.

    A row for each direction, pair of sites, number of labelled examples n and ``probe``:

    - a rung: trained on what the rung makes of A's features of the examples, used on B's own.
    - native: trained and used on B's own features; needs B to read the examples.
    - source: trained and used on A's.
    - tokens: on how often each of A's tokens stands in the text.
    - majority: the label that most examples have.

    accuracy is over held-out texts, the mean over ``probe.draws`` draws of the examples, with 95 %
    intervals over texts. accuracy_shuffled is that of the same probe on shuffled labels;
    lead_tokens and behind_own are paired differences.

    A finished probe.jsonl whose inputs have not changed is left as it is. What single n gave is
    kept at once: an interrupted stage goes on behind them.

    Raises:
      UserError: the file of texts is missing or not understood; there are fewer texts than
        examples, or fewer examples than labels; the store, a model, a dictionary or a map is
        missing or damaged.
    """
    started = time.perf_counter()
    asked = config.probe
    texts = read_labelled(asked.source, text=asked.text, label=asked.label)
    store = open_store(work.activations)
    groups = map_groups(config, store, layers=asked.layers, kinds=asked.rungs, of_tokens=True)
    inputs = digests(config, work, store, [task for _, *rungs in groups for task in rungs])
    question = dataclasses.asdict(dataclasses.replace(asked, source=""))
    inputs["probe"] = digest_of([question, texts.texts, texts.labels.tolist(), texts.classes])
    stamp = work.result(STAMP)
    if work.result(ROWS).exists() and stamp.exists() and read_json(stamp) == inputs:
        return
    progress = Progress(work.result(PROGRESS), digest_of(inputs))
    rows = list(_rows(config, work, store, texts, groups, progress))
    write_jsonl(work.result(ROWS), rows)
    write_json(stamp, inputs)
    progress.done()
    wall = time.perf_counter() - started
    work.record_timing("probe", wall_s=wall, texts=len(texts.texts), **device_figures())


def _rows(
    config: Config,
    work: Workdir,
    store: Store,
    texts: Labelled,
    groups: list[list[Task]],
    progress: Progress,
) -> Iterator[dict]:
    """Yields the rows of all directions; those that ``progress`` knows are taken from there."""
    from tqdm import tqdm

    reader = _Texts(FinishedRun(config, work, store), texts)
    parts = [(tasks, n) for tasks in groups for n in sorted(config.probe.examples)]
    with tqdm(total=len(parts), desc="probes", unit="part") as bar:
        direction = None
        for tasks, n in parts:
            key = (tasks[0].label, n)
            if key not in progress.known:
                if direction is None or direction.task != tasks[0]:
                    direction = _Direction(reader, tasks)
                progress.keep(key, {"rows": direction.rows(n)})
            yield from progress.known[key]["rows"]
            bar.update()


class _Texts:
    """The labelled texts as all models read them, and which of them are held out."""

    def __init__(self, run: FinishedRun, texts: Labelled):
        self.run, self._texts = run, texts
        self._x: dict[tuple, np.ndarray] = {}
        self.classes = texts.classes
        settings = run.config.probe
        n = len(self.read.kept)
        generator = np.random.Generator(np.random.Philox(key=run.config.seed))
        order = generator.permutation(n)
        held_out = round(settings.test_fraction * n)
        self.test, self.train = np.sort(order[:held_out]), np.sort(order[held_out:])
        self._check()

    @cached_property
    def read(self) -> Read:
        run, store = self.run, self.run.store
        return labelled.read_texts(
            self._texts.texts,
            run.tokenizers,
            bos={model: store.has_bos(model) for model in store.models},
            contexts={model: run.lm(model).config.context for model in store.models},
            last=run.config.probe.pooling == "last",
        )

    @property
    def labels(self) -> np.ndarray:
        return self._texts.labels[self.read.kept]

    @property
    def left_out(self) -> dict[str, int]:
        return {
            "n_duplicates": self._texts.duplicates,
            "n_too_long": self.read.too_long,
            "n_not_rebuilt": self.read.not_rebuilt,
            "n_unpaired": self.read.unpaired,
        }

    def _check(self) -> None:
        settings, classes = self.run.config.probe, len(self.classes)
        most, least = max(settings.examples), min(settings.examples)
        why = ", ".join(f"{v} {k[2:].replace('_', ' ')}" for k, v in self.left_out.items())
        of = f"{len(self.read.kept)} of {len(self._texts.texts)} texts are left ({why})"
        if len(self.train) < most:
            raise UserError(
                f"probe.examples={most} is more than the {len(self.train)} texts to train on: "
                f"{of}, less those held out; ask for fewer or give more texts."
            )
        if len(self.test) < 2:
            raise UserError(
                f"probe.test_fraction={settings.test_fraction} holds out {len(self.test)} texts: "
                f"{of}; hold out more or give more texts."
            )
        if least < classes:
            raise UserError(
                f"probe.examples={least} is less than the {classes} different labels of "
                f"probe.label={settings.label}; ask for more, or is that the field of a label?"
            )
        missing = set(range(classes)) - set(self.labels[self.train].tolist())
        if missing:
            raise UserError(
                f"No text to train on has the label {self.classes[min(missing)]}: {of}; give more "
                "texts of that label."
            )

    def side(self, model: str, site: Site) -> Side:
        """A model's side of the rows of all texts."""
        if (model, site) not in self._x:
            config = self.run.config
            self._x[model, site] = labelled.row_activations(
                self.run.lm(model),
                self.read,
                model,
                site,
                batch_size=config.probe.batch_size,
                dtype=config.extract.matmul_dtype,
            )
        texts, position = self.read.tokens[model], self.read.position[model]
        tokens = np.array([texts[t][p] for t, p in zip(self.read.text, position)], np.int32)
        return Side(self._x[model, site], tokens, self.run.dictionary(model, site))

    def examples(self, n: int, draw: int) -> np.ndarray:
        """Returns n training texts, of every label about its share and one at least."""
        seed = [self.run.config.seed, draw]
        generator = np.random.Generator(np.random.Philox(key=seed))
        order = generator.permutation(self.train)
        labels = self.labels[order]
        first = np.array([np.flatnonzero(labels == c)[0] for c in range(len(self.classes))])
        others = np.delete(np.arange(len(order)), first)
        return order[np.concatenate([first, others[: n - len(first)]])]


class _Direction:
    """Probes from A to B at one pair of sites."""

    def __init__(self, texts: _Texts, tasks: list[Task]):
        self.task, self._rungs, self._texts = tasks[0], tasks[1:], texts

    @cached_property
    def _features(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{probe: (what it is trained on, what it is used on), each [texts, d]}."""
        task, texts = self.task, self._texts
        size = texts.run.config.evaluation.batch_size
        source = texts.side(task.source, task.site_source)
        target = texts.side(task.target, task.site_target)

        def one_a_text(f: np.ndarray) -> np.ndarray:
            return pooled(f, texts.read.text, texts.run.config.probe.pooling)

        own = [
            one_a_text(modules.over_rows(side.dictionary, side.x, method="encode", size=size))
            for side in (source, target)
        ]
        pairs = Pairs(source, target, texts.read.text)
        found = {}
        for rung in self._rungs:
            m = maps.load(rung.path(texts.run.work))
            found[rung.kind] = one_a_text(maps.predict(m, pairs, size)), own[1]
        bag = _bag(texts.read.tokens[task.source])
        return found | {NATIVE: (own[1], own[1]), SOURCE: (own[0], own[0]), TOKENS: (bag, bag)}

    def rows(self, n: int) -> list[dict]:
        """Returns the rows of n labelled examples."""
        texts, config = self._texts, self._texts.run.config
        correct = {name: self._correct(name, n) for name in self._features}
        correct[MAJORITY] = self._majority(n)
        draws = stats.draw(
            np.arange(len(texts.test)), count=config.evaluation.bootstrap, seed=config.seed
        )
        mean = {name: draws.mean(right[0]) for name, right in correct.items()}
        task, rows = self.task, []
        for name, right in correct.items():
            rows.append(
                {
                    "source": task.source,
                    "target": task.target,
                    "site_source": str(task.site_source),
                    "site_target": str(task.site_target),
                    "probe": name,
                    "n": n,
                    "n_draws": config.probe.draws,
                    "n_texts": len(texts.test),
                    "n_classes": len(texts.classes),
                    **texts.left_out,
                    **columns("accuracy", mean[name]),
                    "accuracy_shuffled": float(right[1].mean()) if len(right) > 1 else None,
                    **columns("lead_tokens", mean[name] - mean[TOKENS]),
                    **columns("behind_own", mean[NATIVE] - mean[name]),
                }
            )
        return rows

    def _correct(self, name: str, n: int) -> np.ndarray:
        """How often each test text is told right: with true labels and with shuffled ones."""
        texts, config = self._texts, self._texts.run.config
        trained_on, used_on = self._features[name]
        right = np.zeros((2, len(texts.test)))
        for draw in range(config.probe.draws):
            rows = texts.examples(n, draw)
            generator = np.random.Generator(np.random.Philox(key=[config.seed + 1, draw]))
            labels = texts.labels[rows]
            probes = logistic.train(
                trained_on[rows],
                np.stack([labels, generator.permutation(labels)]),
                classes=len(texts.classes),
                penalties=config.probe.penalties,
                seed=config.seed,
            )
            said = np.stack([probe(used_on[texts.test]) for probe in probes])
            right += said == texts.labels[texts.test][None, :]
        return right / config.probe.draws

    def _majority(self, n: int) -> np.ndarray:
        texts, count = self._texts, self._texts.run.config.probe.draws
        right = np.zeros((1, len(texts.test)))
        for draw in range(count):
            most = np.bincount(texts.labels[texts.examples(n, draw)]).argmax()
            right += texts.labels[texts.test] == most
        return right / count


def _bag(tokens: list[np.ndarray]) -> np.ndarray:
    """How often each token stands in each text, float32 [texts, tokens that occur]."""
    known, place = np.unique(np.concatenate(tokens), return_inverse=True)
    text = np.repeat(np.arange(len(tokens)), list(map(len, tokens)))
    bag = np.zeros((len(tokens), len(known)), np.float32)
    np.add.at(bag, (text, place.reshape(-1)), 1)
    return bag
