"""Transcoders: dictionaries that read one site and write another, in every architecture."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_exchange
import tiny_run
from planted_store import PlantedStore, slow_but, train_on, trained
from test_convert import same_features
from test_exchange import CENTRED
from tiny_run import changed, refused

from crossdict_jax import dictionaries, maps, modules, ops
from crossdict_jax.activations import untrained
from crossdict_jax.activations.extract import extract
from crossdict_jax.benchmark.saelens import compare_saelens
from crossdict_jax.causal import intervene, transfer_features
from crossdict_jax.config import ConvertConfig, SAEConfig, to_dict
from crossdict_jax.config.settings import validate
from crossdict_jax.dictionaries import base, start, train
from crossdict_jax.dictionaries.convert import convert
from crossdict_jax.dictionaries.pretrained import adopt
from crossdict_jax.evaluation.reconstruction import reconstruct
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site
from crossdict_jax.studies.dictionary_transfer import measure as dictionary_transfer
from crossdict_jax.studies.dictionary_transfer.transferred import transferred
from crossdict_jax.studies.efficiency import measure as efficiency
from crossdict_jax.studies.steering.measure import steer
from crossdict_jax.verify.recovery import measure_pareto
from crossdict_jax.workdir import Workdir, read_jsonl, write_json

GOLDENS = sorted((Path(__file__).parent / "goldens" / "transcoders").iterdir())
HOOKS = {"hook_name": "blocks.1.hook_resid_mid", "model_name": "toy"}
HOOKS |= {"hook_name_out": "blocks.1.hook_mlp_out"}
key = jax.random.key
HYPER = base.Hyper(0.1, revived=20, k_aux=4, nested_fractions=(0.2, 0.5))
fresh = functools.partial(test_exchange.trained, d_model=6, d_out=4)


def rows(d=6, seed=3, n=32):
    return 2 + jax.random.normal(key(seed), (n, d))


@slow_but("topk")
def test_the_loss_is_of_what_is_written(architecture):
    d, x, dead = fresh(architecture), rows(), jnp.zeros(20, bool)
    hyper = dataclasses.replace(HYPER, dead=dead)
    graphdef, params = modules.split(d)

    def loss_of(params, y):
        return modules.merge(graphdef, params).losses(x, hyper, y)[0]

    far, near = rows(4, seed=9), jnp.asarray(d(x))
    if architecture in ("batchtopk", "matryoshka"):  # which in training use no threshold
        d.threshold[...] = jnp.zeros(())
        near = d.decode(ops.keep_top_k(d.pre_activations(d.scale[...] * x), d.k, over_rows=True))
    _, parts, _ = d.losses(x, hyper, near)
    assert parts.get("fvu", parts.get("mse")) < 1e-8
    assert loss_of(params, far) > loss_of(params, near)
    grads = jax.grad(loss_of)(params, far)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert np.isfinite(grads[name]).all() and np.abs(grads[name]).max() > 0, name


def test_where_reading_is_writing_it_starts_as_an_autoencoder_does():
    x = np.random.default_rng(0).normal(1.0, 1.0, (4000, 6)).astype(np.float32)
    params = {}
    for d_out, rows_ in ((None, (x,)), (6, (x, x))):
        d = base.build("gated", d_model=6, width=20, k=3, key=key(0), d_out=d_out)
        start.begin(d, start.start_of(*rows_))
        params[d_out] = d
    np.testing.assert_allclose(params[6].W_enc[...], params[None].W_enc[...], atol=0.01)
    np.testing.assert_allclose(params[6](x), params[None](x), atol=0.02)


@slow_but("topk")
def test_training_learns_a_planted_linear_output_of_another_size(architecture, tmp_path):
    """Rows read are sums of planted directions, rows written the same sums of other ones."""
    rng, codes = np.random.default_rng(0), np.zeros((4000, 16))
    for row in codes:
        row[rng.choice(16, 2, replace=False)] = rng.uniform(1, 2, 2)
    x, y = (3 + codes @ rng.normal(size=(16, size)) for size in (12, 7))
    penalty = {"gated": 0.2, "relu": 0.1, "jumprelu": 0.05}.get(architecture, 1.0)
    settings = {"architecture": architecture, "l1_coefficient": penalty, "width": 32, "k": 3}
    work = train_on(PlantedStore(x, y=y), tmp_path, steps=300, batch_size=128, **settings)
    d = trained(work)
    assert (d.d_model, d.d_out) == (12, 7)
    shape = {"d_model": 12, "d_out": 7, "width": 32, "k": 3}
    begun = base.build(architecture, **shape, key=key(0))
    start.begin(begun, start.start_of(x, y))
    after, before = (np.square(y - d(x.astype(np.float32))).sum() for d in (d, begun))
    assert after < 0.2 * np.square(y - y.mean(0)).sum() and after < 0.5 * before, (before, after)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose dictionaries write what b's MLP adds: a's in another model, b's in their own."""
    root = tmp_path_factory.mktemp("transcoders")
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(width=32, k=4, steps=30, batch_size=64, output_site="b:mlp_out")
    config.map.kinds = ("mean", "ridge")
    store, work = tiny_run.extracted(config, root / "run")
    train.train_dictionaries(config, store, work)
    maps.fit_maps(config, store, work)
    return config, store, work


def test_the_store_holds_what_is_written_and_maps_see_only_what_is_read(finished):
    config, store, _ = finished
    for model in ("a", "b"):
        assert store.sites_of(model) == (tiny_run.SITE,)
        assert store.output_of(model, tiny_run.SITE) == ("b", Site(1, "mlp_out"))
    assert store.sites == (tiny_run.SITE,)
    rows = store.select("test")
    assert store.read("b", Site(1, "mlp_out"), rows).shape == (len(rows), 24)
    refused(r"has no a at mlp_out\.1", store.read, "a", Site(1, "mlp_out"), rows)
    # A re-initialised model writes where its model does.
    assert untrained.untrained_sites(config, store).writes == {
        ("a-untrained", tiny_run.SITE): ("b", Site(1, "mlp_out")),
        ("b-untrained", tiny_run.SITE): ("b-untrained", Site(1, "mlp_out")),
    }


def test_evaluation_scores_and_puts_in_what_is_written(finished):
    config, store, work = finished
    rows = reconstruct(Loader(config, store, work))["reconstruction.jsonl"]
    ends = [(r["model"], r["site"], r["site_output"]) for r in rows]
    assert ends == [("a", "resid_pre.1", "b:mlp_out.1"), ("b", "resid_pre.1", "mlp_out.1")]
    written, test = ("b", Site(1, "mlp_out")), store.select("test")
    mean = store.read(*written, store.select("train")).mean(axis=0, dtype=np.float64)
    for row in rows:
        d = dictionaries.load(work.dictionary(row["model"], tiny_run.SITE))
        x, y = store.read(row["model"], tiny_run.SITE, test), store.read(*written, test)
        error = np.square(y.astype(np.float64) - d(x.astype(np.float32))).sum()
        variance = np.square(y.astype(np.float64) - mean).sum()
        np.testing.assert_allclose(row["fvu"], error / variance, rtol=1e-4)
    a, b = rows
    assert a["ce_clean"] == b["ce_clean"] and a["ce_zero"] == b["ce_zero"]
    assert a["ce_sae"] != b["ce_sae"]


def test_features_are_stitched_where_they_are_written(finished, capsys):
    config, _, work = finished
    intervene(config, work)
    said = capsys.readouterr().out
    assert "the dictionary of a at resid_pre.1 writes b, another model: left out" in said
    assert "b at resid_pre.1 writes mlp_out.1: there only features are put in" in said
    rows = read_jsonl(work.result("causal.jsonl"))
    assert {(r["site_edited"], r["target"]) for r in rows} == {("mlp_out.1", "b")}
    assert {r["stitch_kind"] for r in rows} == {None, "features"}
    own, zero = (next(r for r in rows if r["control"] == c) for c in ("own_sae", "zero"))
    assert own["kl"] > 0 and own["ce"] != zero["ce"]
    transfer_features(config, work)
    assert "single features: left out" in capsys.readouterr().out
    assert not work.result("feature_causal.jsonl").exists()


def test_an_export_names_both_sites(finished, tmp_path):
    config, _, work = finished
    source, writes = work.dictionary("b", tiny_run.SITE), {"writes": ["b", "mlp_out.1"]}
    d = dictionaries.load(source)
    arrays = {n: np.asarray(a) for n, a in modules.split(d)[1].items()}
    relu = base.from_arrays(base.find("relu"), arrays, transcodes=True)
    dictionaries.save(relu, tmp_path / "run/dictionaries/b/resid_pre.1/seed-0", meta=writes)
    write_json(tmp_path / "run/config.json", to_dict(config))
    convert(ConvertConfig(source=str(tmp_path / "run")), Workdir(tmp_path / "out"))
    folder = tmp_path / "out/dictionaries/b/resid_pre.1/seed-0"
    names = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert names["hook_name"] == "blocks.1.hook_resid_pre"
    assert names["hook_name_out"] == "blocks.1.hook_mlp_out"
    same_features(dictionaries.load(folder), relu)


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda f: f.name)
def test_a_transcoder_of_the_real_library_means_what_it_means_there(folder, tmp_path):
    d, io = dictionaries.load(folder), np.load(folder / "io.npz")
    assert (d.d_model, d.d_out, d.transcodes) == (8, 5, True) and (io["acts"] > 0).any()
    np.testing.assert_allclose(d.encode(io["x"]), io["acts"], atol=1e-5)
    np.testing.assert_allclose(d(io["x"]), io["recon"], atol=1e-5)
    config = json.loads((shutil.copytree(folder, tmp_path / "d") / "cfg.json").read_text())
    config["metadata"] |= CENTRED | {"hook_name": "blocks.1.hook_mlp_out"}
    write_json(tmp_path / "d/cfg.json", config)
    expected = d(io["x"] - io["x"].mean(1, keepdims=True))
    np.testing.assert_allclose(dictionaries.load(tmp_path / "d")(io["x"]), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "batchtopk", "matryoshka"])
def test_an_exported_transcoder_comes_back(architecture, tmp_path):
    d = fresh(architecture)
    dictionaries.save_saelens(d, tmp_path / "d", **HOOKS)
    config = json.loads((tmp_path / "d" / "cfg.json").read_text())
    assert config["architecture"].endswith("transcoder") and config["d_out"] == 4
    assert config["apply_b_dec_to_input"] is False and config["metadata"].items() >= HOOKS.items()
    same_features(dictionaries.load(tmp_path / "d"), d)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_what_saelens_cannot_say_is_refused(architecture, tmp_path, monkeypatch):
    words = f"A {architecture} transcoder has no SAELens form; batchtopk, jumprelu"
    refused(words, dictionaries.save_saelens, fresh(architecture), tmp_path / "d", **HOOKS)
    monkeypatch.setattr(base.find(architecture), "saelens", "")  # a new one, that says none
    d = base.build(architecture, d_model=6, width=20, k=3, key=key(0))
    words = f"A {architecture} dictionary has no SAELens form; batchtopk, "
    refused(words, dictionaries.save_saelens, d, tmp_path / "d", **HOOKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": None}, "lacks the required key 'd_out'"),
        ({"d_out": 6}, "W_dec has shape (20, 5), where (20, 6) is expected"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false for a transcoder"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' of a transcoder is not supported"),
        ({"architecture": "jumprelu_transcoder"}, "lacks threshold"),
        ({"architecture": "skip_transcoder"}, "lacks W_skip"),
        ({"scaling_factor": 2.0}, "a transcoder's scale of what it writes is not known"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(change, message, tmp_path):
    shutil.copytree(GOLDENS[-1], tmp_path / "d")
    name = "activation_scaler" if "scaling_factor" in change else "cfg"
    file = tmp_path / "d" / f"{name}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | change))
    refused(re.escape(message), dictionaries.load, tmp_path / "d")


def test_outputs_that_cannot_be_are_refused_in_one_line(finished, tmp_path):
    def asked(output_site, **changes):
        return changed(finished[0], sae__output_site=output_site, **changes)

    refused(re.escape("nothing, or [MODEL:]KIND[.LAYER]"), validate, asked("mlp_out.x"))
    written = asked("mlp_out", map__kinds=("hypernetwork",))
    refused("needs dictionaries that write the site that they read", validate, written)
    work = Workdir(tmp_path)
    refused("no model 'c'; this run has a, b", extract, asked("c:mlp_out"), work)
    refused("mlp_out.7 is outside a", extract, asked("mlp_out.7"), work)


def test_what_needs_equal_sites_says_so(finished, tmp_path):
    config, store, work = finished
    config = changed(config, steer__feature=1)
    stages = [efficiency.run, dictionary_transfer.run, measure_pareto, steer]
    stages.append(lambda config, work: compare_saelens(config, store, work))
    for stage in stages:
        refused("write the site that they read", stage, config, work)
    d = dictionaries.load(work.dictionary("b", tiny_run.SITE))
    refused("cannot be transferred", transferred, d, None)


def test_an_imported_dictionary_must_write_what_the_run_asks_for(finished, tmp_path):
    config, store, _ = finished
    shape = {"d_model": 16, "width": 20, "k": 0, "key": key(0)}
    dictionaries.save(base.build("relu", **shape), tmp_path / "plain")
    dictionaries.save(base.build("relu", **shape, d_out=9), tmp_path / "nine")
    for name, message in (
        ("plain", "is no transcoder; sae.output_site must name"),
        ("nine", "writes rows of 9, b has 24 at mlp_out.1"),
    ):
        asked = changed(config, sae__sources=(str(tmp_path / name), "train"))
        refused(message, adopt, asked, store, Workdir(tmp_path / f"run-{name}"))
