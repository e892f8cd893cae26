"""What users of this field's tools complain of, each as the kind of mistake that it is."""

import contextlib
import io
import json
import shutil
import sys
import tempfile
import zipfile

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from planted_store import PlantedStore, planted_rows, step_program
from safetensors.numpy import load_file, save_file
from test_exchange import D, means, rows, saelens_folder, weights
from test_models import NARROW_LLAMA
from test_run import SHAPE as GPT2
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from crossdict_jax import dictionaries, evaluation, maps, models, workdir
from crossdict_jax.activations.pairing import byte_ends, control_ids
from crossdict_jax.activations.plan import bos_id
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.config import Config, SAEConfig, TextConfig, fields
from crossdict_jax.dictionaries import base, formats, train
from crossdict_jax.dictionaries.folders import site_of
from crossdict_jax.dictionaries.pretrained import adopt, check_names
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir, read_json
from launch import command


def refused(call, *words: str) -> None:
    """One line that holds all of the words."""
    message = tiny_run.refused(".", call)
    assert not [w for w in words if w not in message], message


OLD = {"architecture": "standard", "sae_lens_training_version": "3.2.1"}
K5 = {"activation_fn_kwargs": {"k": 5}}
OLD_SPELLINGS = [  # a config of SAELens before 6, and what 6 makes of it
    (OLD | {"activation_fn_str": "topk", **K5}, {"k": 5}),
    (OLD | {"activation_fn": "topk", **K5}, {"k": 5}),
    ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2}, "architecture": "topk"}, {"k": 2}),
    ({"activation_fn_str": "relu", "activation_fn_kwargs": {}}, {}),
    (OLD | {"activation_fn_str": None, "activation_fn": "topk", **K5}, {"k": 5}),
    ({"architecture": "topk", **K5}, {"k": 5}),
    ({"architecture": "topk", "activation_fn": "relu", **K5}, {"k": 5}),
    ({"hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2-small"}, {}),
    (OLD | {"normalize_activations": True}, {}),
    ({"architecture": "jumprelu", "activation_fn_str": "relu"}, {}),
]


@pytest.mark.parametrize(("config", "means_k"), OLD_SPELLINGS)
def test_old_saelens_folders_mean_what_the_library_reads(config, means_k, tmp_path):
    names = ("b_enc", "threshold") if config.get("architecture") == "jumprelu" else ("b_enc",)
    arrays = weights(*names)
    ones = {"scaling_factor": np.ones(len(arrays["b_enc"]), np.float32)}  # which says nothing
    folder = saelens_folder(tmp_path / "d", arrays | ones, **config)
    kind = "topk" if means_k else config.get("architecture", "standard")
    means(formats.load(folder), {"architecture": kind} | means_k, arrays)
    said = {"hook_name": config.get("hook_point"), "model_name": config.get("model_name")}
    assert formats.names(folder) == {name: word for name, word in said.items() if word}


UNREADABLE = [OLD | {"activation_fn_str": name} for name in ("tanh-relu", "topk")]
UNREADABLE += [{"architecture": "gated", "activation_fn": "topk"}]
UNREADABLE += [{"architecture": "jumprelu", "activation_fn": "topk", **K5}]
UNREADABLE += [OLD | {"activation_fn_str": "relu", "activation_fn": "topk", **K5}]


@pytest.mark.parametrize("config", UNREADABLE)
def test_old_spellings_that_nobody_can_read_are_not_guessed(config, tmp_path):
    folder = saelens_folder(tmp_path / "d", weights("b_enc"), **config)
    refused(lambda: formats.load(folder), "cfg.json", "activation_fn=", "not supported")
    now = {"architecture": "standard", "metadata": {"sae_lens_version": "6.1.0"}}
    folder = saelens_folder(tmp_path / "new", weights("b_enc"), **config | now)
    means(formats.load(folder), now, weights("b_enc"))  # version 6 does not read such keys


@pytest.mark.parametrize("writes", ["", "model.layers.4.post_feedforward_layernorm.output"])
def test_the_second_gemma_scope_is_read(writes, tmp_path):
    arrays = weights("b_enc", "threshold")
    arrays["threshold"][1] = np.inf  # a dead feature's
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    config |= {"type": "transcoder" if writes else "sae", "affine_connection": bool(writes)}
    config |= {"hf_hook_point_in": "model.layers.4.output", "hf_hook_point_out": writes or None}
    skip = np.random.default_rng(1).normal(size=(D, D)).astype(np.float32)
    extra = {"affine_skip_connection": skip} if writes else {}
    theirs = {n.replace("W_", "w_"): a for n, a in arrays.items()}
    save_file(theirs | extra, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    d, x = formats.load(tmp_path), rows()
    z = x @ arrays["W_enc"] + arrays["b_enc"]
    f = np.where(z > arrays["threshold"], np.maximum(z, 0), 0)
    np.testing.assert_allclose(d.encode(x), f, atol=2e-5)
    expected = f @ arrays["W_dec"] + arrays["b_dec"] + (x @ skip if writes else 0)
    np.testing.assert_allclose(d(x), expected, atol=1e-4)
    assert d.transcodes == bool(writes)
    assert site_of(formats.names(tmp_path)["hook_name"]) == Site(5)
    wrong = {"architecture='relu'": {"architecture": "relu"}, "type='clt'": {"type": "clt"}}
    wrong |= {"type='crosscoder'": {"type": "crosscoder"}}
    wrong |= {"a hook point ['a']": {"hf_hook_point_in": ["a"], "type": None}}
    wrong |= {} if writes else {"affine_connection=True": {"affine_connection": True}}
    for words, keys in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps(config | keys))
        refused(lambda: formats.load(tmp_path), "config.json", words)
    (tmp_path / "config.json").unlink()  # a transcoder's weights have the same shapes
    refused(lambda: formats.load(tmp_path), "lacks config.json")


HOOKS = ("blocks.6.hook_resid_pre", "blocks.5.hook_resid_post", "layers.5", "gpt_neox.layers.5")
HOOKS = dict.fromkeys((*HOOKS, "model.layers.5.output", "blocks.5.hook_out"), Site(6))
HOOKS |= {"blocks.5.attn.hook_z": None, "blocks.5.hook_in": Site(5)}
HOOKS |= dict.fromkeys(("blocks.5.hook_mlp_out", "transformer.h.5.mlp"), Site(5, "mlp_out"))
SAID = [  # keys of a SAELens config, the site that it names
    ({"hook_name": None, "hook_point": "blocks.7.hook_resid_pre"}, Site(7)),
    ({"hook_point": "blocks.7.hook_resid_pre", "metadata": {"hook_name": None}}, Site(7)),
    ({"metadata": {"hf_hook_name": "transformer.h.7.output"}}, Site(8)),
    ({"meta": {"hook_name": "blocks.7.hook_out"}, "metadata": None}, Site(8)),
]
MODULES = {"h.7": Site(8), "gpt_neox.layers.7": Site(8), "transformer.h.7.mlp": Site(7, "mlp_out")}
MODULES |= {"layers.7/seed1": Site(8), "layers.7.attention": Site(7, "attn_out")}


def test_hooks_are_sites_and_folders_say_theirs_in_any_spelling(tmp_path):
    assert {hook: site_of(hook) for hook in HOOKS} == HOOKS
    for n, (config, site) in enumerate(SAID):
        folder = saelens_folder(tmp_path / str(n), weights("b_enc"), **config)
        assert site_of(formats.names(folder)["hook_name"]) == site
    for name, site in MODULES.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "sae.safetensors").touch()
        assert site_of(formats.names(tmp_path / name)["hook_name"]) == site
    (tmp_path / "h.7" / "cfg.json").write_text('{"transcode": true}')  # the module's input
    said = formats.names(tmp_path / "h.7")
    assert [site_of(said[key]) for key in ("hook_name", "hook_name_out")] == [Site(7), Site(8)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"hook_name": "blocks.1.hook_resid_pre", "model_name": "x/A"}, ()),
        ({"hook_name": "blocks.0.hook_resid_post", "model_name": "a"}, ()),  # the same activations
        ({"hook_name": "blocks.0.hook_resid_pre", "model_name": "a"}, ("hook_resid_pre", "pre.1")),
        ({"hook_name": "blocks.1.hook_mlp_out", "model_name": "a"}, ("blocks.1.hook_mlp_out",)),
        ({"hook_name": "blocks.1.hook_resid_pre", "model_name": "b"}, ("model b", "/a; name")),
    ],
)
def test_sources_that_contradict_the_run_are_refused(names, words, shared, tmp_path):
    config, work = shared
    d = base.load(work.dictionary("a", tiny_run.SITE))
    dictionaries.save_saelens(d, tmp_path / "d", **names)
    asked = tiny_run.changed(config, sae__sources=(str(tmp_path / "d"), "train"))
    store = open_store(work.activations)
    if words:
        ask = lambda: adopt(asked, store, Workdir(tmp_path / "no"))  # noqa: E731
        refused(ask, "sae.sources", "sae.source_names=ignore", *words)
        asked.sae.source_names = "ignore"
    assert adopt(asked, store, Workdir(tmp_path / "run")) == {"a"}
    assert formats.names(work.dictionary("a", tiny_run.SITE)) == {}  # of these it is not known


def test_models_whose_folders_have_the_same_name_are_told_by_their_weights(tmp_path):
    x, copy, y = (tmp_path / name / "model" for name in ("x", "copy", "y"))
    for folder in (x, copy, y):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"y" if folder == y else b"x")
    said, site = {"model_name": str(x)}, Site(1)
    check_names(said, "d", str(copy), site, site)
    refused(lambda: check_names(said, "d", str(y), site, site), "is of model", str(y))


def rebuilt(folder, name, change, tokenizer_class=None):
    """A folder with an embedded tokenizer, changed, and a class that transformers rebuilds."""
    shutil.copytree(models.ASSETS / name, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = change(tokenizer) or tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return tokenizer


def lower(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def split_digits(tokenizer):
    parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.model.dropout = 0.5  # of training: ids are those without it


def more_tokens(tokenizer):
    tokenizer.add_special_tokens(["<|new|>"])


def in_front(tokenizer):
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 8), ("<s>", 7))


def nothing_added(tokenizer):
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


@pytest.mark.parametrize("change", [lower, split_digits, more_tokens, in_front, nothing_added])
@pytest.mark.parametrize(
    ("name", "tokenizer_class"),
    [("docs-gpt2", "GPTNeoXTokenizerFast"), ("docs-gpt2", None), ("docs-neox", "GPT2Tokenizer")],
)
def test_the_ids_are_those_of_tokenizer_json(name, tokenizer_class, change, tmp_path):
    theirs = rebuilt(tmp_path / "m", name, change, tokenizer_class)
    theirs.model.dropout = None
    text = "We need 1234 <|new|> in 2024,\n\n  <|endoftext|><|padding|>don't"
    loaded = models.load_tokenizer(tmp_path / "m")
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert loaded(text, add_special_tokens=False)["input_ids"] == expected
    assert loaded(text)["input_ids"] == theirs.encode(text).ids
    assert loaded.get_vocab() == theirs.get_vocab()
    assert bos_id(loaded) == (7 if change is in_front else None)  # which is no bos_token
    if change is not lower:  # which no byte end survives
        assert byte_ends(text, loaded).ids.tolist() == expected


def test_one_token_at_most_is_read_in_front_of_a_text(tmp_path):
    two = processors.TemplateProcessing("x y $A", special_tokens=[("x", 3), ("y", 4)])
    rebuilt(tmp_path / "m", "docs-gpt2", lambda t: setattr(t, "post_processor", two))
    refused(lambda: bos_id(models.load_tokenizer(tmp_path / "m")), "[3, 4]", "post_processor")
    no_a = normalizers.Replace("a", "")
    rebuilt(tmp_path / "n", "docs-gpt2", lambda t: in_front(t) or setattr(t, "normalizer", no_a))
    assert bos_id(models.load_tokenizer(tmp_path / "n")) == 7


def twice(tree):
    """Two tokens have one id: which of them it means, two readings of the file decide anew."""
    vocabulary, merges = tree["model"]["vocab"], tree["model"]["merges"]
    for number, parts in enumerate(merges[:40]):
        vocabulary[f"again{number}"] = vocabulary["".join(parts)]


VAST = [lambda tree: tree["model"]["vocab"].update(a=2**31)]
VAST += [lambda tree: tree["added_tokens"][-1].update(id=2**31)]


@pytest.mark.parametrize("spoil", [*VAST, twice])
def test_vast_ids_and_a_tokenizer_that_contradicts_itself_are_named(spoil, tmp_path):
    rebuilt(tmp_path / "m", "docs-gpt2", more_tokens)
    tree = json.loads((tmp_path / "m/tokenizer.json").read_text())
    spoil(tree)
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(tree))
    load = lambda: models.load_tokenizer(tmp_path / "m")  # noqa: E731
    if spoil is twice:
        refused(lambda: byte_ends("abc", load()), "contradicts itself (Token", "out of vocabulary")
    else:  # before tables are made
        refused(load, "a token has the id 2147483648")


def test_a_tokenizer_that_names_a_file_of_another_folder_is_refused(tmp_path):
    rebuilt(tmp_path / "m", "docs-gpt2", more_tokens)
    shutil.copy(tmp_path / "m/tokenizer.json", tmp_path / "tokenizer.4.0.json")
    about = {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(about))
    refused(lambda: models.load_tokenizer(tmp_path / "m"), "fast_tokenizer_files to take instead")


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_of_two_tied_tensors_is_enough(stored, tmp_path):
    lm = models.init(NARROW_LLAMA | {"tie_word_embeddings": True})
    models.save(lm, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[stored] = tensors.pop("model.embed_tokens.weight").astype(np.float64)
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(models.load(tmp_path).W_E[...], lm.W_E[...])
    save_file(tensors | {stored: tensors[stored][:, :4]}, tmp_path / "model.safetensors")
    refused(lambda: models.load(tmp_path), "weight")


ACTIVATIONS = {
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_name_are_those_of_transformers(name):
    x = np.linspace(-4, 4, 101)
    ours = models.base.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, ACTIVATIONS[name](x), atol=3e-6)
    assert models.init(GPT2 | {"activation_function": name}).config.activation == name


TYPES = {"F8_E4M3": 8, "F8_E5M2": 8, "F6_E2M3": 6, "I4": 4}  # bits of a number


@pytest.mark.parametrize("dtype", TYPES)
def test_types_that_numpy_lacks_are_named(dtype, tmp_path):
    """``save_file`` cannot write such a tensor: the header is changed by hand."""
    models.save(models.init(GPT2), tmp_path / "m")
    saelens_folder(tmp_path / "d", weights("b_enc"), architecture="standard")
    loads = {"m/model.safetensors": models.load, "d/sae_weights.safetensors": formats.load}
    for where, load in loads.items():
        file, tensors = tmp_path / where, load_file(tmp_path / where)
        name = max(tensors)
        size = tensors[name].size * TYPES[dtype] // 8
        save_file(tensors | {name: np.zeros(size, np.uint8)}, file)
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header[name] |= {"dtype": dtype, "shape": tensors[name].shape}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        said = "a weight" if dtype == "I4" else repr(name)  # I4: unknown to safetensors as well
        refused(lambda load=load, f=file: load(f.parent), file.name, f"{said} is {dtype}, which")


SWITCHES = {"enable_x64": True, "numpy_dtype_promotion": "strict", "default_prng_impl": "rbg"}
SWITCHES |= {"threefry_partitionable": False, "transfer_guard": "disallow"}


def numbers(config, work):
    """What the doors give, in float64 of numpy."""
    store, x = open_store(work.activations), np.random.default_rng(0).normal(1, 2, (9, 16))
    lm, tokens = models.load(config.models[0]), np.arange(12)[None, :]
    d = dictionaries.load(work.dictionary("a", tiny_run.SITE))
    f, b = d.encode(x), dictionaries.load(work.dictionary("b", tiny_run.SITE))
    found = [lm.logits(tokens), models.capture(lm, tokens, [Site(1)])[Site(1)]]
    found += [f, d.decode(np.asarray(f, np.float64)), d(x)]
    for kind in config.map.kinds:
        folder = work.map("a", "b", tiny_run.SITE, tiny_run.SITE, kind)
        m = maps.load(folder)
        given = {"features": f, "activations": x, "tokens": np.arange(9)}[m.reads]
        found += [m(given), jax.vmap(m)(given[None])[0]]
    y = b.encode(store.read("b", tiny_run.SITE, np.arange(9)))
    mean, settings = np.asarray(y).mean(0), {"pool": 5, "bootstrap": 0}
    scores = evaluation.transfer_metrics(found[-6], y, train_mean=mean, **settings)
    found.append(models.init(GPT2, seed=3).W_E[...])
    with jax.transfer_guard("allow"):
        key = jax.random.key(0)
    found.append(base.build("topk", d_model=8, width=9, k=2, key=key).W_dec[...])
    assert {np.asarray(a).dtype for a in found} == {np.dtype(np.float32)}
    return found, scores


def test_the_numbers_are_those_of_float32_whatever_switches_are_set(shared):
    plain, scores = numbers(*shared)
    with contextlib.ExitStack() as stack:  # as a caller may have set them
        for name, value in SWITCHES.items():
            stack.enter_context(getattr(jax, name)(value))
        other, other_scores = numbers(*shared)
    for a, b in zip(plain, other):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    defined = [key for key, score in scores.items() if score is not None]
    assert len(defined) > 9 and other_scores.keys() == scores.keys()
    for key in defined:
        assert other_scores[key] == pytest.approx(scores[key], rel=1e-5), key


def test_commands_set_the_switches_that_they_need(monkeypatch):
    expected = jax.random.normal(jax.random.key(0), (3,))
    others = {"enable_x64": True, "default_prng_impl": "rbg", "threefry_partitionable": False}
    others |= {"random_seed_offset": 1, "transfer_guard": "disallow"}
    for name, value in others.items():
        jax.config.update(f"jax_{name}", value)
    command._set_up_jax()
    numbers = jax.random.normal(jax.random.key(0), (3,))
    assert numbers.dtype == jnp.float32 and (numbers == expected).all()
    for error in (RuntimeError("Unable to initialize"), AssertionError()):
        broken = lambda e=error: (_ for _ in ()).throw(e)  # noqa: E731
        monkeypatch.setattr(jax, "devices", broken)
        refused(command._set_up_jax, "JAX_PLATFORMS=", str(error), "set JAX_PLATFORMS=cpu")
        monkeypatch.setenv("JAX_PLATFORM_NAME", "cuda")
        refused(command._set_up_jax, "JAX_PLATFORM_NAME=cuda")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
    refused(command._set_up_jax, "JAX_NUM_CPU_DEVICES=0", "unset")


HARD = {
    "integer": f'{{"text": "x", "n": {"9" * 5000}}}',
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep object": f'{{"text": "x", "n": {"[" * 100_000}{"]" * 100_000}}}',
}


@pytest.mark.parametrize("name", HARD)
def test_json_that_python_cannot_read_is_read_or_named(name, tmp_path):
    lines = [json.dumps({"text": f"Story number {i}"}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, HARD[name]]) + "\n")
    load = lambda: load_corpus(TextConfig(source=str(tmp_path / "text.jsonl")))  # noqa: E731
    if name == "integer":
        assert "x" in {d.text for d in load()}
    else:
        refused(load, "text.jsonl line 61 is not JSON")
    (tmp_path / "config.json").write_text(HARD[name])
    if name != "integer":
        refused(lambda: read_json(tmp_path / "config.json"), "config.json is damaged")
        refused(lambda: models.load_config(tmp_path), "config.json is damaged")


def test_the_true_cause_of_an_empty_split_is_told_with_its_count(tmp_path):
    def refused_texts(texts, *words, **settings):
        rows = [{"text": str(text)} for text in texts]
        source = tiny_run.write_rows(tmp_path / "text.jsonl", rows)
        refused(lambda: load_corpus(TextConfig(source=source, **settings)), *words)

    refused_texts(["üü"] * 60, "60 others are blank within text.max_bytes=1", "raise", max_bytes=1)
    few = {"validation_fraction": 1e-6}
    refused_texts(range(60), "raise text.validation_fraction=1e-06", **few)
    refused_texts([0, 1, 2, 2, 2], "gave 3 documents", "2 others are equal", "give more text")
    same = [f"{'same ' * 500}{i}" for i in range(60)]
    refused_texts(same, "59 others are equal", "max_bytes=2048")
    refused_texts(["one", "two"] + [" "] * 20, "20 others were blank", "give more text")


@pytest.mark.parametrize("rule", ["keep", "skip"])
def test_control_tokens_that_a_text_spells_are_counted_and_may_be_left_out(rule, tmp_path):
    config = tiny_run.make_config(tmp_path)
    config.extract.control_tokens = rule
    tokenizer = models.load_tokenizer(config.models[0])
    control = control_ids(tokenizer)[0]
    spelled = tokenizer.convert_ids_to_tokens(control)
    file = sorted((tmp_path / "text").glob("*.txt"))[0]
    words = file.read_text().split()
    file.write_text(" ".join([*words[:9], spelled, *words[9:]]))
    store, work = tiny_run.extracted(config, tmp_path / "run")
    pairing = read_json(work.result("pairing.json"))
    assert set(pairing["control_tokens"].values()) == {1}
    dropped = pairing["dropped"]["after_control_tokens"]
    assert (dropped > 0) == (rule == "skip")
    left_out = (~store.rows.keep).sum() - pairing["dropped"]["norm_outliers"]
    assert left_out == dropped
    at = np.flatnonzero(store.rows.token[:, 0] == control)
    assert len(at) == 1 and store.rows.keep[at - 1] and store.rows.keep[at] == (rule == "keep")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "topk", "l1_coefficient": (1.0, 2.0)}, "relu"),
        ({"architecture": "relu", "k": (4, 8)}, "topk"),
        ({"architecture": "gated", "l0_target": 8.0}, "jumprelu"),
        ({"architecture": "relu", "products": "lists"}, "topk"),
        ({"architecture": "batchtopk", "nested_fractions": (0.5,)}, "matryoshka"),
        ({"architecture": "jumprelu", "l0_target": 65.0, "width": 64}, "larger than sae.width=64"),
        ({"architecture": "topk", "k": (4, 65), "width": (64, 128)}, "sae.k=65 is larger"),
        ({"pareto": fields.ParetoConfig(("relu",), k=(4, 8))}, "pareto.k=4,8 means nothing"),
        ({"pareto": fields.ParetoConfig(("topk",), penalties=(7.0,))}, "pareto.penalties=7.0"),
        ({"pareto": fields.ParetoConfig(("topk",), k=(8, 4097))}, "pareto.k=4097 is too high"),
        ({"intervention": fields.InterventionConfig(feature_ids=(4096,))}, "give 4095 or less"),
        ({"intervention": fields.InterventionConfig(feature_ids=(3,), features=0)}, "nothing with"),
    ],
)
def test_settings_that_nothing_reads_are_refused(changes, words):
    groups = {"sae": SAEConfig(**changes)} if "architecture" in changes else changes
    config = Config(models=("a", "b"), **groups)
    config.map.kinds = ("ridge",)
    refused(lambda: command.check(config), f"{min(groups)}.", words)
    if "products" in changes:
        config.map.kinds = ("crosscoder",)  # whose codes are of that kind
        command.check(config)


def test_the_program_does_not_grow_with_the_parts_of_a_batch():
    store = PlantedStore(planted_rows(n=600)[0])
    sizes = []
    for accumulate in (2, 8, 32):
        sae = SAEConfig(width=16, k=2, batch_size=64, accumulate=accumulate)
        group = train.members(sae, [("planted", Site(0))])
        ensemble = train.prepare(sae, store, group, store.select("train"))
        sizes.append(step_program(ensemble).count("\n"))
    assert max(sizes) - min(sizes) < 0.02 * min(sizes)


def test_help_without_docstrings(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    assert command.execute(print, ["test", "--help"]) == 0
    assert "None" not in capsys.readouterr().out


def test_links_lead_nowhere_outside_of_a_folder(tmp_path):
    models.save(models.init(GPT2), tmp_path / "m")
    saelens_folder(tmp_path / "d", weights("b_enc"), architecture="standard")
    workdir.write_text(tmp_path / "t/a.txt", "text")
    loads = {"m/model.safetensors": models.load, "m/config.json": models.load, "t/b.txt": read_text}
    loads |= {"m/tokenizer.json": models.load_tokenizer, "d/cfg.json": formats.load}
    for name, load in loads.items():
        file, outside = tmp_path / name, tmp_path / f"outside{len(name)}"
        outside.write_bytes(file.read_bytes() if file.exists() else b"{}")
        file.unlink(missing_ok=True)
        file.symlink_to(outside)
        refused(lambda load=load, f=file: load(f.parent), file.name, "leads out of")
        file.unlink()
        shutil.copy(outside, file)
    (tmp_path / "snapshots").mkdir()  # as the hub's cache lies on a disk
    snapshot = (tmp_path / "d").rename(tmp_path / "snapshots/1")
    (snapshot / "cfg.json").rename(tmp_path / "outside")
    (tmp_path / "blobs").mkdir()
    (snapshot / "cfg.json").symlink_to("../../outside")
    formats.load(snapshot)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
        np.lib.format.write_array_header_1_0(header, about)
        archive.writestr("W_enc.npy", header.getvalue() + bytes(2**24))


def cut_parquet(path):
    pq.write_table(pa.table({"text": ["some words"] * 999, "n": range(999)}), path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(60) + data[64:])


def resealed(path):
    d = base.build("relu", d_model=4, width=8, k=0, key=jax.random.key(0))
    base.save(d, path)
    file = path / "0/meta/metadata"
    file.write_text("{}")
    workdir.write_json(path / "0.sha256.json", workdir.folder_digests(path / "0"))


LLM = {name: value for name, value in GPT2.items() if name != "n_layer"}


def read_text(file):
    return load_corpus(TextConfig(source=str(file)))


ENDLESS = OLD | {"dtype": "float32", "d_in": float("inf")}
LOST = {"weight_map": {"a": "x" * 300}}
HARMFUL = [  # what is written, where, what reads it, what the one line says
    (bomb, "params.npz", formats.load, "says that it holds"),
    (cut_parquet, "t.parquet", read_text, "damag"),
    (resealed, "d", formats.load, "holds another checkpoint"),
    (LLM | {"n_layer": 10**9}, "config.json", models.load, "n_layer 1000000000 must be"),
    (LLM | {"n_layer": 1, "eos_token_id": {}}, "config.json", models.load, "token ids"),
    (OLD | {"metadata": [1]}, "cfg.json", formats.load, "damaged or not of its kind"),
    (ENDLESS, "cfg.json", formats.load, "d_in=inf"),
    (LOST, "model.safetensors.index.json", models.load, "lacks"),
]


@pytest.mark.parametrize(("content", "file", "load", "words"), HARMFUL)
def test_files_that_mean_harm_are_named(content, file, load, words, tmp_path):
    if callable(content):
        content(tmp_path / file)
        refused(lambda: load(tmp_path / file), words)
        return
    saelens_folder(tmp_path, weights("b_enc"))
    models.save(models.init(LLM | {"n_layer": 1}), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(json.dumps(content))
    refused(lambda: load(tmp_path), words)


def test_settings_of_any_length(capsys, tmp_path):
    flags = [f"--config.seed={'9' * 4000}", f"--{'x' * 5000}=1", f"--models={'y' * 5000},~no/x"]
    flags += [f"--workdir={'w' * 300}", "--config.text.source=~nobody/x"]

    def main(config, work):
        models.load(config.models[0])
        load_corpus(config.text)

    for flag in flags:
        assert command.execute(main, ["test", f"--workdir={tmp_path}/run", flag]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


WHOLE = {"command extract_activations", "command evaluate"}  # by hand: python tests/fuzz.py
READERS = [r for r in fuzz.readers() if r not in WHOLE | {"command report"}]


@pytest.mark.parametrize("reader", [*READERS, tiny_run.slow("command report")])
def test_hostile_input_ends_well_or_in_a_line(reader, shared, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fuzz, "lab", lambda: shared)
    numbers = range(1, 8 if reader.startswith("command ") else 50)  # more by tests/fuzz.py
    assert not [each for each in fuzz.cases(reader, numbers, seed=0) if each[1] not in fuzz.GOOD]
