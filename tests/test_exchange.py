"""Exchange: folders of SAELens, sparsify and Gemma Scope mean here what they mean there."""

import functools
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from tiny_run import DATA

from crossdict_jax import dictionaries, modules
from crossdict_jax.dictionaries import base, formats
from crossdict_jax.dictionaries.architectures import jumprelu

D, F, K = 8, 20, 3
FOREIGN = sorted((Path(DATA).parent / "saelens").glob("*/")) if DATA else []
foreign = pytest.mark.parametrize("folder", FOREIGN, ids=lambda f: f.name)
HOOK = {"hook_name": "blocks.0.hook_resid_pre", "model_name": "toy"}
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


def rows(n=40, seed=9):
    return np.random.default_rng(seed).normal(1, 2, (n, D)).astype(np.float32)


def weights(*names, seed=0):
    """Random arrays of a SAELens folder, with nothing at zero."""
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "topk_threshold": ()}
    rng = np.random.default_rng(seed)
    made = {n: rng.normal(size=shapes.get(n, (F,))) for n in ("W_enc", "W_dec", "b_dec", *names)}
    made |= {n: np.abs(made[n]) for n in made if "threshold" in n}
    return {n: np.asarray(a, np.float32) for n, a in made.items()}


def saelens_folder(path, arrays, *, scaler=None, **config):
    path.mkdir(parents=True, exist_ok=True)
    plain = {"d_in": D, "d_sae": F, "dtype": "float32", "normalize_activations": "none"}
    (path / "cfg.json").write_text(json.dumps(plain | config))
    save_file(arrays, path / "sae_weights.safetensors")
    if scaler is not None:
        (path / "activation_scaler.json").write_text(json.dumps(scaler))
    return path


def saelens(config, w, x):
    """Returns (features, the whole pass) by the definitions of SAELens, in its own order."""
    u, undo = saelens_norm(config.get("normalize_activations"), x)
    u = u - w["b_dec"] * config.get("apply_b_dec_to_input", True)
    norms = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else 1
    f = saelens_features(config, w, u, norms)
    return f, undo((f / norms) @ w["W_dec"] + w["b_dec"])


def saelens_norm(norm, x):
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if norm == "constant_norm_rescale":
        factor = D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        return x * factor, lambda y: y / factor
    return x, lambda y: y


def saelens_features(config, w, u, norms):
    if config["architecture"] == "gated":
        magnitude = np.maximum(u @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
        return (u @ w["W_enc"] + w["b_gate"] > 0) * magnitude
    z = (u @ w["W_enc"] + w["b_enc"]) * norms
    threshold = w.get("threshold", w.get("topk_threshold", 0.0))
    size = np.abs(z) if config["architecture"] == "abstopk" else z
    if "topk" in config["architecture"] and "batch" not in config["architecture"]:
        keep = np.argsort(np.argsort(-size, axis=1), axis=1) < config["k"]
        return np.where(keep, z if config["architecture"] == "abstopk" else np.maximum(z, 0), 0)
    return np.maximum(z, 0) * (z > threshold)


def means(d, config, w, *, scale=1.0, rtol=1e-7, atol=2e-5):
    """Asserts that a dictionary does what SAELens does with these weights and scaled rows."""
    f, x_hat = saelens(config, w, scale * rows())
    # Decoder norms, which features are multiplied by, are in raw units then.
    f = f / (scale if config.get("rescale_acts_by_decoder_norm") else 1)
    assert (f != 0).any() and (f == 0).any()
    np.testing.assert_allclose(d.encode(rows()), f, rtol=rtol, atol=2e-5)
    np.testing.assert_allclose(d(rows()), x_hat / scale, rtol=rtol, atol=atol)


NAMES = dict.fromkeys(("standard", "topk", "abstopk"), ("b_enc",))
NAMES |= {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
NAMES |= dict.fromkeys(("batchtopk", "matryoshka_batchtopk"), ("b_enc", "topk_threshold"))
CASES = [
    {"architecture": a, "apply_b_dec_to_input": b, "normalize_activations": n}
    | {"rescale_acts_by_decoder_norm": rescaled}
    for a, b, n in [
        *itertools.product(NAMES, (True, False), ("none",)),
        ("standard", None, "expected_average_only_in"),
        ("standard", True, "layer_norm"),
        ("topk", False, "constant_norm_rescale"),
        ("gated", False, "layer_norm"),
    ]
    for rescaled in (False, True)[: 1 + ("topk" in a)]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_saelens_folder_means_what_it_means_there(case, tmp_path):
    config = {k: v for k, v in case.items() if v is not None} | {"k": K}
    w = weights(*NAMES[case["architecture"]])
    d = dictionaries.load(saelens_folder(tmp_path / "d", w, **config))
    means(d, config, w)
    f = modules.over_rows(d, rows(), method="encode", size=7)
    np.testing.assert_allclose(f, d.encode(rows()), atol=1e-5)
    folder = saelens_folder(tmp_path / "centred", w, **config, metadata=HOOK | CENTRED)
    if config.get("normalize_activations") == "constant_norm_rescale":
        return refused(folder, "center_writing_weights=True with normalize_activations='constant")
    f = saelens(config, w, rows() - rows().mean(1, keepdims=True))[0]
    np.testing.assert_allclose(dictionaries.load(folder).encode(rows()), f, atol=2e-5)


def test_that_a_scale_is_taken_to_be_folded_is_said(tmp_path, capsys):
    scale = {"normalize_activations": "expected_average_only_in"}
    for scaler, words in (({"scaling_factor": 0.3}, ""), (None, "put activation_scaler.json")):
        folder = saelens_folder(tmp_path / words, weights("b_enc"), scaler=scaler, **scale)
        dictionaries.load(folder)
        assert (words in (told := capsys.readouterr().out)) and bool(words) == bool(told)


@pytest.mark.parametrize("architecture", [a for a in NAMES if a != "abstopk"])
def test_the_scale_of_unfinished_training_is_folded(architecture, tmp_path):
    config = {"architecture": architecture, "k": K}
    config["rescale_acts_by_decoder_norm"] = "topk" in architecture
    w, scaler = weights(*NAMES[architecture]), {"scaling_factor": 0.3, "has_whitening": False}
    d = dictionaries.load(saelens_folder(tmp_path / "d", w, scaler=scaler, **config))
    means(d, config, w, scale=0.3, rtol=2e-5, atol=5e-5)


def test_a_jumprelu_threshold_is_strict_and_exact(tmp_path):
    w = weights("b_enc", "threshold") | {"b_enc": np.zeros(F, np.float32)}
    w |= {"b_dec": np.zeros(D, np.float32), "W_enc": np.eye(D, F, dtype=np.float32)}
    w["threshold"] = np.full(F, 0.3, np.float32)
    d = dictionaries.load(saelens_folder(tmp_path / "d", w, architecture="jumprelu"))
    at, above = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    f = np.asarray(d.encode(jnp.asarray([[at] * D, [above] * D])))
    assert (f[0] == 0).all() and (f[1, :D] == above).all()


@foreign
def test_a_foreign_folder_encodes_and_decodes_as_there(folder):
    io, d = np.load(folder / "io.npz"), dictionaries.load(folder)
    np.testing.assert_allclose(d.encode(io["x"]), io["acts"], atol=1e-5)
    np.testing.assert_allclose(d.decode(io["acts"]), io["recon"], atol=1e-5)
    np.testing.assert_allclose(d(io["x"]), io["forward"], atol=1e-5)


@foreign
def test_a_foreign_checkpoint_gives_what_its_training_step_had(folder):
    """The weights of the step are the checkpoint's; its rows are in normalised units."""
    step, d = np.load(folder / "train_step.npz"), dictionaries.load(folder / "checkpoint")
    scaler = json.loads((folder / "checkpoint" / "activation_scaler.json").read_text())
    s = scaler["scaling_factor"] or 1.0
    np.testing.assert_allclose(s * d.decode(step["acts"]), step["recon"], atol=1e-5)
    f = np.asarray(d.encode(step["x"] / s))
    if folder.name == "batchtopk":  # there the step chose over the batch
        f, acts = np.where(step["acts"] > 0, f, 0), np.where(f > 0, step["acts"], 0)
        assert (acts > 0).sum() > 0.5 * (step["acts"] > 0).sum()
    else:
        acts = step["acts"]
    np.testing.assert_allclose(f, acts, atol=1e-5)


STEPS = {"standard": "relu", "standard_normed": "relu", "jumprelu": "jumprelu", "gated": "gated"}


def arrays_of(step, prefix):
    """The library's arrays of one kind, in our names."""
    names = [name for name in step.files if name.startswith(prefix)]
    return {n.removeprefix(prefix).replace("b_gate", "b_enc"): step[n] for n in names}


@pytest.mark.parametrize("name", STEPS if FOREIGN else [])
def test_loss_gradients_and_a_step_of_adam_are_those_of_the_real_library(name, monkeypatch):
    step = np.load(FOREIGN[0].parent / name / "train_step.npz")
    coefficient = step["coef_l0" if name == "jumprelu" else "coef_l1"]
    hyper = base.Hyper(coefficient, revived=0, k_aux=1, dead=step["dead"])
    monkeypatch.setattr(jumprelu, "BANDWIDTH", 0.2)  # as there
    kind = base.find(STEPS[name])
    graphdef, params = modules.split(base.from_arrays(kind, arrays_of(step, "w_")))

    def loss_of(params):
        return modules.merge(graphdef, params).losses(step["x"], hyper)[0]

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(params)
    np.testing.assert_allclose(loss, step["loss"], rtol=1e-5)
    for name, gradient in arrays_of(step, "g_").items():
        np.testing.assert_allclose(grads[name], gradient, atol=1e-5, err_msg=name)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    updates, _ = adam.update(grads | {"scale": jnp.zeros(())}, adam.init(params))
    theirs = arrays_of(step, "after_") | {"scale": 1.0}
    for name, value in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5, err_msg=name)


def trained(architecture, *, d_model=D, d_out=None):
    """A dictionary with nothing at its initial value, its threshold among the activations."""
    shape = {"d_model": d_model, "d_out": d_out, "width": F, "k": K}
    d = base.build(architecture, **shape, key=jax.random.key(0))
    for i, name in enumerate(modules.split(d)[1]):
        variable = getattr(d, name)
        noise = jax.random.normal(jax.random.key(i), variable[...].shape)
        variable[...] = variable[...] + 0.3 * (jnp.abs(noise) if name == "threshold" else noise)
    d.scale[...] = jnp.asarray(0.4)
    return d


@pytest.mark.parametrize("architecture", base.architectures())
def test_an_export_means_there_what_it_means_here(architecture, tmp_path):
    d = trained(architecture)
    dictionaries.save_saelens(d, tmp_path / "d", **HOOK)
    config = json.loads((tmp_path / "d" / "cfg.json").read_text())
    w = load_file(tmp_path / "d" / "sae_weights.safetensors")
    means(d, config, w, atol=5e-5)
    assert config["apply_b_dec_to_input"] is True and config["dtype"] == "float32"
    assert config["metadata"].items() >= HOOK.items()
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    dictionaries.save(d, tmp_path / "ours")
    (tmp_path / "ours" / "sae_weights.safetensors").touch()  # of an older export
    assert dictionaries.load(tmp_path / "ours").meta == d.meta
    export = functools.partial(dictionaries.save_saelens, d, **HOOK)
    tiny_run.refused("ours holds a checkpoint", export, tmp_path / "ours")
    d.b_dec[...] = d.b_dec[...].at[1].set(jnp.nan)
    tiny_run.refused("b_dec of the dictionary holds NaN", export, tmp_path / "d")


NORMED = {"architecture": "standard", "normalize_activations": "layer_norm"}
ABSOLUTE = {"architecture": "abstopk", "k": K}


@pytest.mark.parametrize(("config", "name"), [(ABSOLUTE, "AbsTopK"), (NORMED, "LayerNormed")])
def test_what_ours_cannot_say_is_refused_by_save_and_export(config, name, tmp_path):
    d = dictionaries.load(saelens_folder(tmp_path / "d", weights("b_enc"), **config))
    words = f"{name} dictionaries have no checkpoint of their own"
    tiny_run.refused(words, dictionaries.save, d, tmp_path / "ours")
    tiny_run.refused(name, dictionaries.save_saelens, d, tmp_path / "theirs", **HOOK)
    tiny_run.refused(words, base.architecture_of, d)  # as of a source of a run


def sparsify_folder(path, arrays, **config):
    path.mkdir()
    arrays = dict(arrays)
    arrays["encoder.weight"] = np.ascontiguousarray(arrays.pop("W_enc").T)
    arrays["encoder.bias"] = arrays.pop("b_enc")
    save_file(arrays, path / "sae.safetensors")
    (path / "cfg.json").write_text(json.dumps(config))
    return path


SPARSIFY = {"activation": "topk", "k": K, "d_in": D, "num_latents": F, "expansion_factor": 32}
READABLE = [{}, {"transcode": True, "multi_topk": True}, {"num_latents": 0, "expansion_factor": 2}]


@pytest.mark.parametrize("config", READABLE)
def test_a_sparsify_folder_means_what_it_means_there(config, tmp_path):
    w, width = weights("b_enc"), F if config.get("num_latents", F) else 2 * D
    w |= {"W_enc": w["W_enc"][:, :width], "W_dec": w["W_dec"][:width], "b_enc": w["b_enc"][:width]}
    d = dictionaries.load(sparsify_folder(tmp_path / "d", w, **(SPARSIFY | config)))
    centred = not config.get("transcode")
    means(d, {"architecture": "topk", "k": K, "apply_b_dec_to_input": centred}, w)


@pytest.mark.parametrize("as_file", [False, True])
def test_gemma_scope_params_are_read(as_file, tmp_path):
    w = weights("b_enc", "threshold")
    np.savez(tmp_path / "params.npz", **w)
    d = dictionaries.load(tmp_path / "params.npz" if as_file else tmp_path)
    means(d, {"architecture": "jumprelu", "apply_b_dec_to_input": False}, w)


def test_a_format_is_one_file(tmp_path, monkeypatch):
    """A module beside the others reads what it recognises, with no entry in any list."""
    w = weights("b_enc")
    foreign = SimpleNamespace(recognises=lambda path: path.endswith(".mine"))
    foreign.load = lambda path: base.from_arrays(base.find("relu"), w)
    monkeypatch.setitem(sys.modules, "crossdict_jax.dictionaries.formats.mine", foreign)
    names = formats.files_of("dictionaries/formats")
    monkeypatch.setattr(formats, "files_of", lambda folder: (*names, "mine"))
    means(dictionaries.load(tmp_path / "a.mine"), {"architecture": "standard"}, w)


NAN = np.full(F, np.nan, np.float32)


def refused(path, message):
    assert str(path) in tiny_run.refused(re.escape(message), dictionaries.load, path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "sigmoid"}, "architecture='sigmoid' is unknown; it may be standard"),
        ({"architecture": "topk"}, "lacks the required key 'k'"),
        ({"architecture": "topk", "k": 0}, "k=0 must be a whole number, 1 to 20"),
        ({"architecture": "topk", "k": F + 1}, "k=21 must be a whole number, 1 to 20"),
        ({"normalize_activations": "batch"}, "normalize_activations='batch' must be none"),
        ({"architecture": "jumprelu"}, "lacks threshold; its weights must be"),
        ({"weights": weights("b_enc", "W_skip")}, "holds W_skip"),
        ({"weights": weights("b_enc") | {"b_enc": NAN}}, "b_enc holds NaN"),
        ({"d_sae": F + 1}, "W_enc has shape (8, 20), where (8, 21) is expected"),
        ({"scaler": {"scaling_factor": 1.0, "has_whitening": True}}, "has_whitening"),
        ({"scaler": {"scaling_factor": 0.0}}, "scaling_factor=0.0 must be a number above 0"),
        ({"scaler": {"scaling_factor": True}}, "scaling_factor=True must be a number above 0"),
        ({"weights": weights("b_enc", "scaling_factor")}, "holds scaling_factor"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input='false' must be true or false"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input=None must be true or false"),
        ({"rescale_acts_by_decoder_norm": 1}, "decoder_norm=1 must be true or false"),
        (CENTRED | {"hook_name": "blocks.0.hook_q"}, "at hook_name='blocks.0.hook_q' is not sup"),
        ({"model_from_pretrained_kwargs": {"revision": "x"}}, "revision='x', which may change"),
        *(
            ({"weights": weights("b_enc") | {"b_enc": np.ones(F, t)}}, f"'b_enc' is {t}, which")
            for t in ("bool", "int64", "uint16", "complex64")
        ),
    ],
)
def test_a_saelens_folder_that_cannot_be_read_is_told_in_one_line(config, message, tmp_path):
    config = {"architecture": "standard", "weights": weights("b_enc")} | config
    refused(saelens_folder(tmp_path / "d", config.pop("weights"), **config), message)


@pytest.mark.parametrize("keep", [0, 100, -1])
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_a_file_cut_short_is_named(name, keep, tmp_path):
    folder = saelens_folder(tmp_path / "d", weights("b_enc"), architecture="standard")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: min(keep, len(content) - 1)])
    refused(folder, f"{folder / name} is damaged")


def test_missing_files_are_named(tmp_path):
    folder = saelens_folder(tmp_path / "d", weights("b_enc"), architecture="standard")
    (folder / "cfg.json").write_text("[1]")
    refused(folder, f"{folder / 'cfg.json'} holds no JSON object")
    (folder / "cfg.json").unlink()
    refused(folder, "lacks cfg.json")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    refused(folder, "sae_weights.pt, which could run code, is never read")
    (folder / "sae_weights.pt").unlink()
    refused(folder, "holds no finished checkpoint of a run; copy the weights there, or run")
    (folder / "layer_4/params.safetensors").mkdir(parents=True)  # no file
    (folder / "layer_5").mkdir()
    (folder / "layer_5/params.safetensors").touch()
    refused(folder, "name what lies in it (layer_5), copy")
    (folder / "cfg.json").write_text("{}")
    refused(folder, "has neither sae_weights.safetensors (SAELens) nor sae.safetensors")


def test_a_sparsify_folder_that_cannot_be_read_is_told_in_one_line(tmp_path):
    wrong = {
        "activation='groupmax' is not supported, only 'topk'": {"activation": "groupmax"},
        "gram_lookup=True is not supported, only F": {"gram_lookup": True, "lookup_max_order": 4},
        "embed_skip=True is not supported, only False": {"embed_skip": True},
        "transcode='false' must be true or false": {"transcode": "false"},
        "lacks the required key 'expansion_factor'": {"num_latents": 0, "expansion_factor": None},
    }
    for i, (message, config) in enumerate(wrong.items()):
        refused(sparsify_folder(tmp_path / str(i), weights("b_enc"), **SPARSIFY | config), message)


def test_objects_and_cut_archives_of_gemma_scope_are_refused(tmp_path):
    file = tmp_path / "params.npz"
    np.savez(file, **weights("b_enc", "threshold"))
    whole = file.read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:keep])
        refused(file, "is damaged")
    np.savez(file, W_enc=np.asarray([{}], object))
    refused(file, "is damaged or holds objects")
    for kind in ("S4", "U8", "M8[s]", "V2", "c8", "?"):  # V2: bfloat16, as numpy saves it
        np.savez(file, **weights("b_enc") | {"threshold": np.zeros(F, kind)})
        refused(file, f"'threshold' is {np.dtype(kind).name}, which is not read; save")
    np.savez(file, W_enc=np.zeros(3, ml_dtypes.float8_e5m2))
    refused(file, "unknown types (descr is not a valid dtype descriptor: '<f1')")
    np.savez(file, W_dec=np.zeros((3, 2)))
    refused(file, "lacks W_enc, b_dec, b_enc, threshold")
