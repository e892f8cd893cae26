"""No setting does nothing: each is read somewhere, and some of each stage are seen to act."""

import ast
import dataclasses
import hashlib
import itertools
import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from map_problems import fit_one, make_problem

from crossdict_jax import config as config_room
from crossdict_jax import modules
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.config import (
    BenchmarkConfig,
    Config,
    ConvertConfig,
    MapConfig,
    PretrainConfig,
    SAEConfig,
    TextConfig,
    VerifyConfig,
    settings,
)
from crossdict_jax.dictionaries.train import members
from crossdict_jax.maps import tasks
from crossdict_jax.maps.controls import control_tasks

ROOT = Path(__file__).parents[1]
KINDS = (Config, PretrainConfig, ConvertConfig, VerifyConfig, BenchmarkConfig)

# ---------------------------------------------------------------- every setting is read


def accesses(tree: ast.Module) -> set[str]:
    """Every attribute that a module reads, and every name; not those of classes of settings."""
    body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    body += [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.endswith("Config")]
    nodes = list(itertools.chain.from_iterable(map(ast.walk, body)))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return read | {n.id for n in nodes if isinstance(n, ast.Name)}


@pytest.fixture(scope="module")
def files() -> list[set[str]]:
    sources = [p for d in ("crossdict_jax", "launch") for p in (ROOT / d).rglob("*.py")]
    return [accesses(ast.parse(path.read_text())) for path in sources]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_read_somewhere(kind, files):
    """By a file that also names the group of the setting, or a class of settings."""
    classes = {name for name in vars(config_room) if name.endswith("Config")}
    unread = []
    for name in settings.settings(kind):
        group, last = (["", *name.split(".")])[-2:]
        near = {group or "config", "settings", *classes}
        if not any(last in read and read & near for read in files):
            unread.append(name)
    assert not unread, f"Nothing reads {', '.join(unread)}: drop them, or let them act."


# ---------------------------------------------------------------- some are seen to act


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text of which every line is a document of two columns."""
    folder = tmp_path_factory.mktemp("options")
    lines = [json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in tiny_run.make_texts(60)]
    (folder / "lines.jsonl").write_text("".join(lines))
    (folder / "others.jsonl").write_text("".join(lines[::-1]))
    return folder


@pytest.fixture(scope="module")
def seen(home, tmp_path_factory):
    """(probe, settings) -> what the probe makes of them, as text."""
    config, work = tiny_run.shared_run(tmp_path_factory.getbasetemp())
    store, numbers = open_store(work.activations), itertools.count()

    def corpus(text):
        place = {"source": str(home / text.get("source", "lines.jsonl"))}
        small = {"documents": 40, "validation_fraction": 0.3, "test_fraction": 0.3}
        return [
            (d.text, d.split) for d in load_corpus(TextConfig(**(small | text | place))).documents
        ]

    def ensemble(sae):
        return members(SAEConfig(**sae), [("a", tiny_run.SITE), ("b", tiny_run.SITE)])

    def fitted(map_):
        kind = map_.pop("kind", "mlp")
        config = MapConfig(**({"hidden": 8, "steps": 4, "batch_size": 16} | map_))
        return fit_one(kind, problem(), home / f"fitted-{next(numbers)}", config).map

    def listed(run):
        changed = dataclasses.replace(
            config, map=MapConfig(kinds=run.pop("kinds", ("mean", "mlp")))
        )
        changed = dataclasses.replace(changed, **run)
        return tasks(changed, store), control_tasks(changed, store)

    probes = {"text": corpus, "sae": ensemble, "map": fitted, "run": listed}
    return cache(lambda probe, given: spelled(probes[probe](dict(given))))


@cache
def problem():
    x = np.random.default_rng(0).normal(size=(2300, 5))
    return make_problem(x, np.maximum(x[:, :4] + x[:, 1:], 0))[0]


def spelled(value) -> str:
    """Text that is equal for equal documents, tasks or parameters alone."""
    if callable(value):
        leaves = jax.tree.leaves(modules.split(value)[1])
        return " ".join(hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for a in leaves)
    return str(value)


ACTS = [  # probe, a setting, another value of it than the default, what else is set
    ("text", "source", "others.jsonl", {}),
    ("text", "column", "other", {}),
    ("text", "documents", 30, {}),
    ("text", "max_bytes", 9, {}),
    ("text", "validation_fraction", 0.45, {}),
    ("text", "test_fraction", 0.5, {}),
    ("sae", "width", 8192, {}),
    ("sae", "k", 16, {}),
    ("sae", "learning_rate", (1e-3, 2e-3), {}),
    ("sae", "l1_coefficient", 9.0, {"architecture": "relu"}),
    ("sae", "seeds", 2, {}),
    ("map", "ridge_penalties", (50.0,), {"kind": "ridge"}),
    ("map", "head", "relu", {}),
    ("map", "learning_rate", 1e-4, {}),
    ("run", "kinds", ("mean", "ridge"), {}),
    ("run", "controls", ("ceiling",), {}),
    ("run", "control_kinds", ("mlp",), {"controls": ("ceiling",)}),
]


@pytest.mark.parametrize(("probe", "name", "value", "given"), ACTS)
def test_a_setting_acts(probe, name, value, given, seen):
    as_it_was = tuple(sorted(given.items()))
    before, after = seen(probe, as_it_was), seen(probe, (*as_it_was, (name, value)))
    assert before != after, f"{name}={value} changes nothing"


@pytest.mark.parametrize("probe", ["text", "sae", "map", "run"])
def test_a_probe_sees_the_same_twice(probe, seen):
    """Else every setting would seem to act."""
    assert seen.__wrapped__(probe, ()) == seen(probe, ())
