"""A finished run in miniature, for tests of the stages that only read checkpoints."""

import copy
import fcntl
import functools
import itertools
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from crossdict_jax import dictionaries, maps, models
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import Config, settings, to_dict
from crossdict_jax.dictionaries.base import build
from crossdict_jax.errors import UserError
from crossdict_jax.maps.kinds.mlp import MLP
from crossdict_jax.maps.network import initial
from crossdict_jax.models import Site
from crossdict_jax.pretraining.tokenizer import save_tokenizer, train_tokenizer
from crossdict_jax.workdir import Workdir, open_workdir, read_json, write_jsonl, write_text

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("CROSSDICT_DATA")  # real models, tokenizers and dictionaries
needs_data = pytest.mark.skipif(not DATA, reason="CROSSDICT_DATA is not set")
CONTEXT = 64
SITE = Site(1)
SHAPES = {  # of a large init, so that edits matter without training
    "a": {"model_type": "gpt2", "vocab_size": 290, "n_embd": 16, "n_layer": 2, "n_head": 2}
    | {"n_positions": CONTEXT, "initializer_range": 0.3},
    "b": {"model_type": "gpt_neox", "vocab_size": 310, "hidden_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": CONTEXT}
    | {"rotary_pct": 0.5, "initializer_range": 0.3},
}
SMALL = """layers=1 control_kinds=ridge map.kinds=mean,token,ridge,mlp checkpoint_every=20
    sae.width=32 sae.k=4 sae.steps=60 sae.batch_size=64 map.steps=40 map.batch_size=64 map.hidden=16
    evaluation.bootstrap=20 intervention.features=2 intervention.contexts=8
    intervention.documents=8 text.documents=60"""


def slow(*case):
    """A case of a parametrized test that only the slow tests run."""
    return pytest.param(*case, marks=pytest.mark.slow)


def refused(words: str, call, *arguments, **how) -> str:
    """The line with these words (a pattern) in which a call ends."""
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments, **how)
    line = str(caught.value)
    assert "\n" not in line
    return line


def make_texts(n: int) -> list[str]:
    """Documents of made-up words."""
    rng = np.random.default_rng(0)
    letters = list("abcdefgh")
    words = ["".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(60)]
    return [" ".join(rng.choice(words, rng.integers(15, 40))) for _ in range(n)]


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes a .jsonl file; its path."""
    write_jsonl(path, rows)
    return str(path)


def make_models(root: Path, texts: list[str], shapes=SHAPES, *, copies=False) -> tuple[str, ...]:
    """Random language models, or one again and again, with tokenizers; their folders."""
    for seed, (name, shape) in enumerate(shapes.items()):
        tokenizer = train_tokenizer(texts, vocab_size=shape["vocab_size"], nfc=False)
        models.save(models.init(shape, seed=0 if copies else seed), root / name, dtype="float32")
        save_tokenizer(tokenizer, root / name, context=CONTEXT)
    return tuple(str(root / name) for name in shapes)


def small_flags(root: Path) -> list[str]:
    """The flags of a whole small run; its text is written to ``root``, its models beside that."""
    texts = make_texts(60)
    source = write_rows(root / "text.jsonl", [{"text": text} for text in texts])
    models = ",".join(make_models(root.parent / "models", texts))
    return flags(SMALL, **{"models": models, "text.source": source})


def flags(settings: str, **changes) -> list[str]:
    """What is asked for on a command line: "name=value ...", with changes by name."""
    asked = dict(pair.split("=") for pair in settings.split()) | changes
    return [f"--config.{name}={value}" for name, value in asked.items()]


def changed(config: Config, **values) -> Config:
    """A copy of a config with other settings, by dotted name, dots written as __."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        settings.put(config, name.replace("__", "."), value)
    return config


def make_config(root: Path) -> Config:
    """The settings of the run, its text written to ``root``; tests of controls turn them on."""
    texts = make_texts(60)
    for i, text in enumerate(texts):
        write_text(root / "text" / f"{i}.txt", text)
    config = Config(models=make_models(root, texts), layers=(SITE.layer,), controls=())
    small = {"text__source": str(root / "text"), "text__documents": 60, "text__window_tokens": 40}
    small |= {"sae__width": 32, "sae__k": 6, "map__kinds": ("mean", "token", "ridge", "mlp")}
    small |= {"evaluation__bootstrap": 40, "evaluation__pool": 64, "evaluation__batch_size": 512}
    return changed(config, **small, intervention__documents=6, intervention__batch_size=8)


@functools.cache
def shared_run(base: Path) -> tuple[Config, Workdir]:
    """The run that all tests share, made once; each worker has its copy, not to be changed."""
    common = base.parent if base.name.startswith("popen-") else base  # of the workers of xdist
    root, done = common / "tiny", common / "tiny.done"
    with (common / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make_run(root)
            done.touch()
    copy = Workdir(base / "tiny-run")
    shutil.copytree(root / "run", copy.root)
    return settings.from_dict(Config, read_json(copy.root / "config.json")), copy


def private_run(tmp_path_factory) -> tuple[Config, Workdir]:
    """A copy of the shared run that a module may write into."""
    run = shared_run(tmp_path_factory.getbasetemp())
    return copied(run, tmp_path_factory.mktemp("private"))


def copied(run: tuple[Config, Workdir], folder: Path) -> tuple[Config, Workdir]:
    """A copy of a run, to be changed or damaged."""
    config, work = run
    return config, Workdir(shutil.copytree(work.root, folder / "run"))


def extracted(config: Config, folder: Path):
    """The store of a new run in this folder, and its work directory."""
    work = open_workdir(folder, to_dict(config))
    return extract(config, work), work


def make_run(root: Path) -> tuple[Config, Workdir]:
    """Extracts, draws random dictionaries and networks, and fits the closed forms."""
    config = make_config(root)
    store, work = extracted(config, root / "run")
    save_dictionaries(store, work)
    for task in maps.tasks(config, store):
        if task.kind == "mlp":
            folder = work.dictionary(task.target, SITE)
            maps.save(network(folder), task.path(work), dictionary=folder)
    maps.fit_maps(config, store, work)
    return config, work


def save_dictionaries(store, work: Workdir, *, width: int = 32, k: int = 6) -> None:
    """Saves a random TopK dictionary for every model and site of a store."""
    for i, (model, site) in enumerate(itertools.product(store.models, store.sites)):
        shape = {"d_model": store.d_model(model), "width": width, "k": k}
        d = build("topk", **shape, key=jax.random.key(i))
        dictionaries.save(d, work.dictionary(model, site))


def network(folder: Path) -> MLP:
    """An untrained network that predicts a constant, some features of which are silent."""
    trained = initial(0, width_a=32, hidden=8, width_b=32, head="relu")
    mean_b = jax.numpy.maximum(jax.random.normal(jax.random.key(5), (32,)), 0)
    ones = jax.numpy.ones(32)
    measured = {"mean_a": 0 * ones, "mean_b": mean_b, "scale_a": ones, "scale_b": ones}
    return MLP(dictionaries.load(folder), trained | measured, head="relu")
