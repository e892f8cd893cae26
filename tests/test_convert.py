"""Conversion and the hub: what goes out means what came in, and mistakes are told in one line."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_hub import FakeHub
from tiny_run import SITE, shared_run

from crossdict_jax import dictionaries
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import ConvertConfig, architectures
from crossdict_jax.config.settings import validate
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.formats import hub, saelens
from crossdict_jax.dictionaries.formats.convert import convert
from crossdict_jax.dictionaries.pretrained import unselected
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir

ROOT = Path(__file__).parents[1]
NAMED = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "toy"}


def rows(d, n=50):
    return np.random.default_rng(0).normal(0.5, 2, (n, d)).astype(np.float32)


def trained(architecture, seed=0):
    """A dictionary with nothing at zero, as after training."""
    d = base.build(architecture, d_model=8, width=20, k=3, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for name in ("b_enc", "b_dec", "b_mag", "r_mag", "threshold"):
        if hasattr(d, name):
            value = getattr(d, name)
            value[...] = np.abs(rng.normal(0, 0.3, value[...].shape)).astype(np.float32)
    d.scale[...] = np.float32(0.7)
    return d


def same_features(a, b):
    x = rows(a.d_model)
    np.testing.assert_allclose(a.encode(x), b.encode(x), atol=1e-5)
    np.testing.assert_allclose(a(x), b(x), atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return shared_run(tmp_path_factory.getbasetemp())


# ---------------------------------------------------------------- between formats


@pytest.mark.parametrize("architecture", architectures())
def test_there_and_back_is_the_same_dictionary(architecture, tmp_path):
    d = trained(architecture)
    base.save(d, tmp_path / "d")
    out, back = Workdir(tmp_path / "out"), Workdir(tmp_path / "back")
    (folder,) = convert(ConvertConfig(source=str(tmp_path / "d"), **NAMED), out)
    assert (Path(folder) / saelens.CONFIG).is_file()
    (again,) = convert(ConvertConfig(source=folder, format="crossdict"), back)
    same_features(d, dictionaries.load(folder))
    same_features(d, base.load(again))


def test_a_run_is_converted_whole_and_names_its_hooks(tiny, tmp_path):
    _, work = tiny
    written = convert(ConvertConfig(source=str(work.root)), Workdir(tmp_path))
    assert len(written) == 2
    for folder in map(Path, written):
        about = saelens.read_config(folder / saelens.CONFIG)["metadata"]
        assert about["hook_name"] == f"blocks.{SITE.layer}.hook_resid_pre"
        assert Path(about["model_name"]).name == folder.parents[1].name
        same_features(
            base.load(work.root / "dictionaries" / folder.relative_to(tmp_path / "dictionaries")),
            dictionaries.load(folder),
        )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"source": "nowhere", **NAMED}, "nowhere is no dictionary folder"),
        ({"source": "{d}"}, "give --config.model_name and --config.hook_name"),
        ({"source": "{d}", "format": "crossdict", "push": "hub:me/x"}, "only SAELens folders"),
        ({"source": "{d}", "push": "me/x", **NAMED}, "'me/x' is no place on the hub"),
        ({"source": "hub:me", **NAMED}, "'hub:me' is no place on the hub"),
        ({"source": "hub:me/x/../y", **NAMED}, "is no place on the hub"),
        ({"source": "{empty}"}, "no finished dictionary"),
    ],
)
def test_mistakes_are_told_in_one_line(asked, words, tmp_path):
    base.save(trained("topk"), tmp_path / "d")
    (tmp_path / "empty/dictionaries").mkdir(parents=True)
    (tmp_path / "empty/config.json").write_text('{"models": ["a", "b"]}')
    places = {"d": tmp_path / "d", "empty": tmp_path / "empty"}
    config = ConvertConfig(**(asked | {"source": asked["source"].format(**places)}))
    with pytest.raises(UserError, match=words) as error:
        convert(config, Workdir(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_what_to_convert_must_be_said():
    with pytest.raises(UserError, match="source= must be something"):
        validate(ConvertConfig())


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ("hub:a/b", hub.Place("a/b", "", None)),
        ("hub:a/b/c/d.e", hub.Place("a/b", "c/d.e", None)),
        ("hub:a/b/c@v1", hub.Place("a/b", "c", "v1")),
    ],
)
def test_places_on_the_hub(reference, place):
    assert hub.parse(reference) == place


def command(name, *settings, url, home):
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",  # the hub is on this machine
        "HF_HUB_DISABLE_XET": "1",  # the plain protocol, which the other is a speed-up of
        "XLA_FLAGS": "",
    }
    asked = [sys.executable, "-m", f"launch.{name}", *settings]
    return subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(hub, folder): a dictionary converted and uploaded by the command."""
    folder = tmp_path_factory.mktemp("pushed")
    base.save(trained("jumprelu"), folder / "d")
    named = [f"--config.{name}={value}" for name, value in NAMED.items()]
    with FakeHub() as server:
        done = command(
            "convert",
            f"--workdir={folder}/out",
            f"--config.source={folder}/d",
            "--config.push=hub:me/dictionaries/layers.1",
            *named,
            url=server.url,
            home=folder / "hf",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"{server.url}/me/dictionaries/commit/")
        yield server, folder


def test_an_upload_holds_the_folder_and_nothing_else(pushed):
    server, _ = pushed
    (files,) = server.repositories.values()
    assert set(files) == {"layers.1/d/cfg.json", "layers.1/d/sae_weights.safetensors"}


def test_what_was_uploaded_comes_back_the_same(pushed):
    server, folder = pushed
    (done, refused) = (
        command(
            "convert",
            f"--workdir={folder}/back-{i}",
            f"--config.source=hub:me/dictionaries/{inside}",
            "--config.format=crossdict",
            url=server.url,
            home=folder / "elsewhere",
        )
        for i, inside in enumerate(("layers.1/d", "layers.2"))
    )
    assert done.returncode == 0, done.stderr
    same_features(base.load(folder / "d"), base.load(done.stdout.strip()))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("hub:me/dictionaries/layers.2: me/dict")


@pytest.mark.parametrize(
    ("status", "words"), [(403, "hf auth login"), (500, "status 500"), (404, "no such repository")]
)
def test_a_hub_that_refuses_is_told_in_one_line(status, words, monkeypatch, tmp_path):
    from huggingface_hub import errors

    def refuse(*_, **__):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        kind = errors.RepositoryNotFoundError if status == 404 else errors.HfHubHTTPError
        raise kind("no", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=words):
        dictionaries.load("hub:me/dictionaries")


# ---------------------------------------------------------------- dictionaries of others in a run


def retrained(tiny, tmp_path, **changes):
    """The stage that trains, on the shared store, in a work directory of its own."""
    import copy

    config, work = tiny
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config.sae, name, value)
    config.sae.steps, config.sae.batch_size = 2, 32
    dictionaries.train_dictionaries(config, open_store(work.activations), Workdir(tmp_path / "run"))
    return Workdir(tmp_path / "run")


def source_for(tiny, tmp_path):
    """A SAELens folder for model a at its layer, and its path with {layer} in it."""
    _, work = tiny
    folder = tmp_path / "made" / f"layers.{SITE.layer}"
    d = base.load(work.dictionary("a", SITE))
    dictionaries.save_saelens(d, folder, **NAMED)
    return d, str(tmp_path / "made" / "layers.{layer}")


def test_a_source_takes_the_place_of_training(tiny, tmp_path):
    d, place = source_for(tiny, tmp_path)
    work = retrained(tiny, tmp_path, sources=(place, "train"))
    same_features(d, base.load(work.dictionary("a", SITE)))
    assert base.load(work.dictionary("b", SITE)).d_model == 24  # trained


def test_codes_before_the_selection_on_demand(tiny, tmp_path):
    d, place = source_for(tiny, tmp_path)
    work = retrained(tiny, tmp_path, sources=(place, "train"), source_codes="relu")
    f, selected = base.load(work.dictionary("a", SITE)).encode(rows(16)), d.encode(rows(16))
    assert (np.asarray(f) > 0).sum() > 1.5 * (np.asarray(selected) > 0).sum()
    np.testing.assert_allclose(np.where(selected > 0, f, 0), selected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": ("train",)}, "1 entries for 2 models"),
        ({"sources": ("train", "{place}")}, "reads rows of 16, b has 24"),
        ({"sources": ("nowhere", "train")}, "nowhere is no dictionary folder"),
    ],
)
def test_wrong_sources_are_refused(changes, words, tiny, tmp_path):
    _, place = source_for(tiny, tmp_path)
    sources = tuple(place if s == "{place}" else s for s in changes["sources"])
    with pytest.raises(UserError, match=words):
        retrained(tiny, tmp_path, sources=sources)


def test_sources_are_single_dictionaries(tiny):
    import copy

    config = copy.deepcopy(tiny[0])
    config.sae.sources, config.sae.seeds = ("train", "x"), 2
    with pytest.raises(UserError, match=r"sae\.seeds asks for several"):
        validate(config)


def test_unselected_drops_nothing_but_the_selection():
    d = trained("jumprelu")
    x = rows(8)
    np.testing.assert_allclose(
        unselected(d).encode(x), np.maximum(d.pre_activations(0.7 * x), 0), atol=1e-5
    )
