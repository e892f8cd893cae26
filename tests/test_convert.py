"""Conversion and the hub: what goes out means what came in, and mistakes are told in one line."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_hub import FakeHub
from safetensors.numpy import save_file
from test_exchange import CENTRED, trained
from test_launch import launch
from tiny_run import SITE, changed, refused

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import ConvertConfig, architectures
from crossdict_jax.config.settings import validate
from crossdict_jax.dictionaries import base, formats, hub
from crossdict_jax.dictionaries.convert import convert
from crossdict_jax.dictionaries.pretrained import adopt, check_sources
from crossdict_jax.dictionaries.train import train_dictionaries
from crossdict_jax.workdir import Workdir, read_json, write_json

NAMED = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "a"}


def same_features(a, b):
    x = np.random.default_rng(0).normal(0.5, 2, (50, a.d_model)).astype(np.float32)
    np.testing.assert_allclose(a.encode(x), b.encode(x), atol=1e-5)
    np.testing.assert_allclose(a(x), b(x), atol=1e-5)


@pytest.mark.parametrize("architecture", architectures())
def test_there_and_back_is_the_same_dictionary(architecture, tmp_path):
    d = trained(architecture)
    base.save(d, tmp_path / "d")
    out, back = Workdir(tmp_path / "out"), Workdir(tmp_path / "back")
    (folder,) = convert(ConvertConfig(source=str(tmp_path / "d"), **NAMED), out)
    assert (Path(folder) / "cfg.json").is_file()
    (again,) = convert(ConvertConfig(source=folder, format="crossdict"), back)
    same_features(d, dictionaries.load(folder))
    same_features(d, base.load(again))
    config = read_json(file := Path(folder) / "cfg.json")
    write_json(file, config | {"metadata": config["metadata"] | CENTRED})
    (again,) = convert(ConvertConfig(source=folder), Workdir(tmp_path / "more"))
    assert read_json(f"{again}/cfg.json")["metadata"].items() >= (CENTRED | NAMED).items()
    same_features(dictionaries.load(folder), dictionaries.load(again))


def test_a_run_is_converted_whole_and_names_its_hooks(shared, tmp_path):
    _, work = shared
    written = convert(ConvertConfig(source=str(work.root)), Workdir(tmp_path))
    assert len(written) == 2
    for folder in map(Path, written):
        about = read_json(folder / "cfg.json")["metadata"]
        assert about["hook_name"] == f"blocks.{SITE.layer}.hook_resid_pre"
        assert Path(about["model_name"]).name == folder.parents[1].name
        own = base.load(work.root / folder.relative_to(tmp_path))
        same_features(own, dictionaries.load(folder))
    named = ConvertConfig(source=str(work.root), model_name="m")
    refused("is a run, which knows .* out --config.model_name=m", convert, named, Workdir(tmp_path))
    run = shutil.copytree(work.root, tmp_path / "run")
    next((run / "dictionaries").glob("*/*/seed-0/*.sha256.json")).unlink()  # as after a kill
    refused("holds no finished", convert, ConvertConfig(source=str(run)), Workdir(tmp_path / "c"))


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("layers.6", "blocks.6.hook_resid_post"),
        ("transformer.h.6.mlp", "blocks.6.hook_mlp_out"),
        ("model.layers.6.self_attn", "blocks.6.hook_attn_out"),
        ("model.layers.6.mlp.act_fn", None),  # a hook that is not known here
    ],
)
def test_modules_of_transformers_become_hooks_and_no_model_is_made_up(module, hook, tmp_path):
    source = tmp_path / module
    write_json(source / "cfg.json", {"d_in": 6, "num_latents": 8, "k": 2})
    arrays = {"encoder.weight": (8, 6), "encoder.bias": (8,), "W_dec": (8, 6), "b_dec": (6,)}
    save_file({n: np.ones(s, np.float32) for n, s in arrays.items()}, source / "sae.safetensors")
    out = Workdir(tmp_path / "out")
    refused(r"give --config.model_name \(", convert, ConvertConfig(source=str(source)), out)
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model": "m"}')
    (folder,) = convert(ConvertConfig(source=str(source)), out)
    about = read_json(Path(folder) / "cfg.json")["metadata"]
    del about["sae_lens_version"]
    assert about == {"model_name": "m", "hf_hook_name": module} | (
        {"hook_name": hook} if hook else {}
    )
    assert formats.names(folder) == {"model_name": "m", "hook_name": hook or module}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"source": "nowhere", **NAMED}, "nowhere is no dictionary folder"),
        ({"source": "{d}"}, "give --config.model_name and --config.hook_name"),
        ({"source": "{d}", "format": "crossdict", "push": "hub:me/x"}, "only SAELens folders"),
        ({"source": "{d}", "push": "me/x", **NAMED}, "'me/x' is no place on the hub"),
        ({"source": "hub:me", **NAMED}, "'hub:me' is no place on the hub"),
        ({"source": "hub:me/x/../y", **NAMED}, "is no place on the hub"),
        ({"source": "hub:me/..", **NAMED}, "is no place on the hub"),
        ({"source": "{d}", "push": "hub:../x", **NAMED}, "is no place on the hub"),
        ({"source": "{empty}"}, "no finished dictionary"),
    ],
)
def test_mistakes_are_told_in_one_line(asked, words, tmp_path):
    base.save(trained("topk"), tmp_path / "d")
    (tmp_path / "empty/dictionaries").mkdir(parents=True)
    (tmp_path / "empty/config.json").write_text('{"models": ["a", "b"]}')
    folders = {"d": tmp_path / "d", "empty": tmp_path / "empty"}
    config = ConvertConfig(**(asked | {"source": asked["source"].format(**folders)}))
    refused(words, convert, config, Workdir(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_references_to_the_hub():
    assert hub.parse("hub:a/b") == ("a/b", "", None)
    assert hub.parse("hub:a/b/c/d.e") == ("a/b", "c/d.e", None)
    assert hub.parse("hub:a/b/c@v1") == ("a/b", "c", "v1")


def convert_there(*settings, url, home):
    """Runs the command against a hub on this machine; what it printed last."""
    there = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_test"}
    # The plain protocol, which the other is a speed-up of.
    there |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = launch([sys.executable, "-m", "launch.convert"], *settings, **there)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_what_is_uploaded_comes_back_the_same(tmp_path):
    base.save(trained("jumprelu"), tmp_path / "d")
    out = [f"--workdir={tmp_path}/out", f"--config.source={tmp_path}/d"]
    out += ["--config.push=hub:me/dictionaries/layers.1"]
    out += [f"--config.{name}={value}" for name, value in NAMED.items()]
    back = [f"--workdir={tmp_path}/back", "--config.source=hub:me/dictionaries/layers.1/d"]
    back += ["--config.format=crossdict"]
    with FakeHub() as server:
        address = convert_there(*out, url=server.url, home=tmp_path / "hf")
        assert address.startswith(f"{server.url}/me/dictionaries/commit/")
        (files,) = server.repositories.values()
        assert set(files) == {"layers.1/d/cfg.json", "layers.1/d/sae_weights.safetensors"}
        folder = convert_there(*back, url=server.url, home=tmp_path / "elsewhere")
    same_features(base.load(tmp_path / "d"), base.load(folder))


ANSWERS = {200: "me/dictionaries has no .* in its top folder", 403: "hf auth login"}
ANSWERS |= {401: "on conditions only; accept them", 404: "no such repository"}
ANSWERS |= {500: "status 500", None: "cannot be reached"}


@pytest.mark.parametrize(("status", "words"), ANSWERS.items())
def test_a_hub_that_refuses_is_told_in_one_line(status, words, monkeypatch, tmp_path):
    from huggingface_hub import errors

    def answer(*_, **__):
        if status == 200:
            return tmp_path  # which holds nothing
        if status is None:
            raise TimeoutError
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        kinds = {401: errors.GatedRepoError, 404: errors.RepositoryNotFoundError}
        kind = kinds.get(status, errors.HfHubHTTPError)
        raise kind("no", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    refused(words, dictionaries.load, "hub:me/dictionaries")
    if status == 401:
        refused(words, models.load, "me/model")


def test_a_whole_repository_is_named_after_itself(shared, monkeypatch, tmp_path):
    d = base.load(shared[1].dictionary("a", SITE))
    monkeypatch.setenv("HOME", str(tmp_path))
    dictionaries.save_saelens(d, "~/made", **NAMED)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path / "made")
    (folder,) = convert(ConvertConfig(source="hub:o/top@main"), Workdir(tmp_path))
    assert folder == str(tmp_path / "dictionaries" / "top")


def adopted(shared, tmp_path, **changes):
    """(models that need no training, work directory) of the shared run with other settings."""
    config, work = changed(shared[0], **changes), Workdir(tmp_path / "run")
    return adopt(config, open_store(shared[1].activations), work), work


def source_for(shared, tmp_path):
    """A dictionary of model a, and the path of its SAELens folder with {layer} in it."""
    d = base.load(shared[1].dictionary("a", SITE))
    dictionaries.save_saelens(d, tmp_path / "made" / f"layers.{SITE.layer}", **NAMED)
    return d, str(tmp_path / "made" / "layers.{layer}")


def test_a_source_takes_the_place_of_training(shared, tmp_path):
    d, path = source_for(shared, tmp_path)
    few = {"sae__sources": (path, "train"), "sae__steps": 2, "sae__batch_size": 32}
    config, work = changed(shared[0], **few), Workdir(tmp_path / "run")
    train_dictionaries(config, open_store(shared[1].activations), work)
    same_features(d, base.load(work.dictionary("a", SITE)))
    assert base.load(work.dictionary("b", SITE)).d_model == 24  # trained


def test_codes_before_the_selection_on_demand(shared, tmp_path):
    d, path = source_for(shared, tmp_path)
    asked = {"sae__sources": (path, "train"), "sae__source_codes": "relu"}
    models, work = adopted(shared, tmp_path, **asked)
    assert models == {"a"}
    x = np.random.default_rng(0).normal(0.5, 2, (50, 16)).astype(np.float32)
    f, selected = base.load(work.dictionary("a", SITE)).encode(x), d.encode(x)
    assert (np.asarray(f) > 0).sum() > 1.5 * (np.asarray(selected) > 0).sum()
    np.testing.assert_allclose(np.where(selected > 0, f, 0), selected, atol=1e-5)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"d_model": 16}, "reads rows of 16, b has 24"),
        ({"d_out": 16}, r"is a transcoder; sae\.output_site must name"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "where the run has resid_pre.1"),
        ({"architecture": "abstopk"}, "AbsTopK dictionaries have no checkpoint of their own"),
    ],
)
def test_all_sources_are_checked_before_one_is_stored(second, words, shared, tmp_path):
    _, path = source_for(shared, tmp_path)
    sizes = {"d_model": second.get("d_model", 24), "d_out": second.get("d_out")}
    d = base.build("relu", **sizes, width=20, k=0, key=jax.random.key(0))
    names = {"model_name": "b", "hook_name": second.get("hook_name", "blocks.1.hook_resid_pre")}
    dictionaries.save_saelens(d, tmp_path / "b", **names)
    if "architecture" in second:
        config = read_json(tmp_path / "b" / "cfg.json")
        write_json(tmp_path / "b" / "cfg.json", config | second | {"k": 2})
    sources = {"sae__sources": (path, str(tmp_path / "b"))}
    refused(words, adopted, shared, tmp_path, **sources)
    assert not Workdir(tmp_path / "run").computed  # so that other settings may follow
    # Without a store, too.
    refused(words, check_sources, changed(shared[0], **sources), Workdir(tmp_path / "run"))


def test_settings_that_cannot_be_are_refused(shared, tmp_path):
    refused("source= must be something", validate, ConvertConfig())
    config = changed(shared[0], sae__sources=("train", "x"), sae__seeds=2)
    refused(r"sae\.seeds asks for several", validate, config)
    one = changed(shared[0], sae__sources=("of-{layer}",))
    refused("1 entries for 2 models", check_sources, one, Workdir(tmp_path))
