"""The language models: parity with Hugging Face, sites, folders in and out, and bad input."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_run import DATA, needs_data, refused
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from crossdict_jax import models
from crossdict_jax.models import Site, capture
from crossdict_jax.models.attention import attend

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = sorted(file.parent.name for file in GOLDENS.glob("*/config.json"))
EACH_FAMILY = ("gpt2-inverse-layer", "gpt_neox-parallel-quarter-old", "llama-grouped-untied-new")
REAL = ("gpt-tinystories-char", "llama2xs", "stories260k")
NARROW_LLAMA = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 16}
NARROW_LLAMA |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NARROW_LLAMA |= {"intermediate_size": 24}
SHARDED = b'{"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}'
CUT_SHORT = (GOLDENS / "gpt2-relu" / "model.safetensors").read_bytes()[:-100]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
each_family = pytest.mark.parametrize("variant", EACH_FAMILY)


@functools.cache
def golden_model(variant: str) -> tuple[dict[str, np.ndarray], models.LanguageModel]:
    """What Hugging Face computed, and our model of the same folder."""
    golden = dict(np.load(GOLDENS / variant / "golden.npz", allow_pickle=False))
    return golden, models.load(GOLDENS / variant)


def relative_error(ours, theirs) -> float:
    """The largest difference, as a share of the largest true value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def copy_of(variant: str, folder: Path, **settings) -> Path:
    """A copy of a golden folder with some settings of its config.json changed."""
    shutil.copytree(GOLDENS / variant, folder)
    raw = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def rewrite_weights(folder: Path, change) -> None:
    """Replaces the tensors of a folder by ``change(tensors)``."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def leaves_equal(a, b) -> bool:
    a, b = jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b))
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@every_variant
def test_logits_and_every_site_match_hugging_face(variant):
    golden, lm = golden_model(variant)
    assert lm.config.model_type in models.model_types()
    graphdef, state = nnx.split(lm)

    @jax.jit
    def read(state, tokens):
        seen = {}
        tap = lambda site, x: seen.setdefault(str(site), x)  # noqa: E731
        return nnx.merge(graphdef, state).logits(tokens, tap=tap), seen

    logits, seen = read(state, golden["tokens"])
    for name, x in (seen | {"logits": logits}).items():
        assert relative_error(x, golden[name]) < 1e-5, name
    assert golden.keys() == seen.keys() | {"logits", "tokens"}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_loss_of_hugging_face(name):
    golden = np.load(GOLDENS / f"loss-{name}.npz", allow_pickle=False)
    lm = models.load(f"{DATA}/models/{name}")
    tokens = golden["tokens"]
    log_p = jax.nn.log_softmax(lm.logits(tokens)[:, :-1])
    loss = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1).mean()
    assert lm.name == name and abs(loss - golden["loss"]) < 1e-4
    assert lm.tokenizer.decode(golden["tokens"][0]).startswith("Once upon a time")


@pytest.mark.parametrize("batch, seq", ((3, 130), (12, 300)))
def test_attention_in_blocks_of_queries_is_attention(batch, seq):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, seq, n, 16)) for key, n in zip(keys, (4, 2, 2)))
    ours = attend(q, 3 * k, v, scale=0.3, dtype=jnp.dtype("float32"), past=None)
    theirs = jax.nn.dot_product_attention(q, 3 * k, v, scale=0.3, is_causal=True)
    assert relative_error(ours, np.asarray(theirs).reshape(ours.shape)) < 1e-5


@each_family
def test_tap_sees_every_site_in_order_and_changes_nothing(variant):
    golden, lm = golden_model(variant)
    seen = []

    def tap(site, x):
        seen.append(site)
        return x

    tokens = jnp.asarray(golden["tokens"])
    tapped = jax.jit(lambda: lm.logits(tokens, tap=tap)).lower().as_text()
    assert seen == [Site(layer, kind) for layer in range(3) for kind in models.KINDS]
    assert tapped == jax.jit(lambda: lm.logits(tokens)).lower().as_text()


@each_family
def test_edits_reach_everything_downstream(variant):
    golden, lm = golden_model(variant)
    replacement = jax.random.normal(jax.random.key(0), golden["resid_pre.1"].shape)

    def read_with(edits):
        seen = {}
        tap = lambda site, x: seen.setdefault(str(site), edits.get(str(site), x))  # noqa: E731
        return lm.logits(golden["tokens"], tap=tap), seen["resid_post.1"]

    post, _ = read_with({"resid_post.0": replacement})
    assert np.array_equal(post, read_with({"resid_pre.1": replacement})[0])
    assert relative_error(post, golden["logits"]) > 0.01
    _, x = read_with({"attn_out.1": replacement, "mlp_out.1": 2 * replacement})
    assert relative_error(x, golden["resid_pre.1"] + 3 * replacement) < 1e-5


@every_variant
def test_a_text_read_in_pieces_is_the_text_read_at_once(variant):
    """Rows stop at different places; what stands behind a row's length is not seen."""
    golden, lm = golden_model(variant)
    tokens = golden["tokens"]
    batch, seq = tokens.shape
    whole, layers = lm.extend(tokens)
    assert relative_error(whole, golden["logits"]) < 1e-5
    length = np.arange(batch, dtype=np.int32) % (seq - 3) + 1
    rest = np.stack([row[n : n + 3] for row, n in zip(tokens, length)])
    logits, new = lm.extend(rest, models.Past(layers, jnp.asarray(length)))
    expected = np.stack([row[n : n + 3] for row, n in zip(np.asarray(whole), length)])
    assert relative_error(logits, expected) < 1e-5
    for layer, (key, _) in new.items():
        own = np.stack([k[n : n + 3] for k, n in zip(np.asarray(layers[layer][0]), length)])
        assert relative_error(key, own) < 1e-5


def test_the_compiler_drops_the_blocks_after_the_last_captured_site():
    raw = dict(model_type="gpt2", vocab_size=8, n_positions=16, n_embd=32, n_layer=4, n_head=2)
    graphdef, state = nnx.split(models.init(raw))
    tokens = jnp.zeros((2, 16), jnp.int32)

    def flops(layer):
        def read(state, tokens):
            return capture(nnx.merge(graphdef, state), tokens, [Site(layer, "resid_post")])

        return jax.jit(read).lower(state, tokens).compile().cost_analysis()["flops"]

    one, two, four = flops(0), flops(1), flops(3)
    assert two == pytest.approx(2 * one, rel=0.05) and four == pytest.approx(4 * one, rel=0.05)


@each_family
def test_bfloat16_products_are_close_and_sums_stay_float32(variant):
    golden, lm = golden_model(variant)
    x = capture(lm, golden["tokens"], [Site(1)], dtype="bfloat16")[Site(1)]
    logits = jax.eval_shape(lambda: lm.logits(golden["tokens"], dtype=jnp.bfloat16))
    assert x.dtype == logits.dtype == jnp.float32
    assert 1e-5 < relative_error(x, golden["resid_pre.1"]) < 0.1
    # Of the gradient no product is of float32 alone: accelerators would take ten times as long.
    graphdef, state = nnx.split(lm)

    def loss(state):
        return nnx.merge(graphdef, state).logits(golden["tokens"], dtype=jnp.bfloat16).sum()

    text = jax.jit(jax.grad(loss)).lower(state).as_text()
    inputs = re.findall(r"dot_general.*: \((tensor<\S+>), (tensor<\S+>)\)", text)
    assert len(inputs) > 20 and all("bf16" in a + b for a, b in inputs)


@every_variant
def test_a_saved_folder_loads_bit_for_bit(variant, tmp_path):
    _, lm = golden_model(variant)
    models.save(lm, tmp_path / "again")  # through float32, where the goldens are float16
    again = models.load(tmp_path / "again")
    assert again.config == lm.config and leaves_equal(again, lm)
    files = (folder / "model.safetensors" for folder in (GOLDENS / variant, tmp_path / "again"))
    assert len({frozenset(load_file(file)) for file in files}) == 1
    models.save(lm, tmp_path / "compact", dtype="bfloat16")
    W_E = models.load(tmp_path / "compact").W_E[...]
    assert W_E.dtype == jnp.float32 and 0 < relative_error(W_E, np.asarray(lm.W_E[...])) < 1e-2


@every_variant
def test_transformers_loads_what_we_save(variant, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    golden, lm = golden_model(variant)
    models.save(lm, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = golden["tokens"]
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert relative_error(lm.logits(tokens), logits) < 1e-5


def test_shards_prefixes_and_known_buffers(tmp_path):
    whole = models.load(GOLDENS / "gpt2-gelu_new")
    folder = copy_of("gpt2-gelu_new", tmp_path / "bare")
    named = load_file(folder / "model.safetensors").items()
    bare = {name.removeprefix("transformer."): value for name, value in named}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 24, 24)), "h.0.attn.masked_bias": np.zeros(())}
    index = {name: f"{i % 3}.safetensors" for i, name in enumerate(sorted(bare))}
    (folder / "model.safetensors").unlink()
    for file in set(index.values()):
        shard = {k: v.astype(np.float32) for k, v in bare.items() if index[k] == file}
        save_file(shard, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert leaves_equal(models.load(folder), whole)


def test_a_head_as_transformers_5_names_it_and_files_in_a_folder(tmp_path):
    folder, x = copy_of(EACH_FAMILY[1], tmp_path / "model"), [[1, 2, 3]]
    expected = models.load(folder).logits(x)
    rewrite_weights(folder, lambda w: {n.replace("embed_out", "lm_head"): w[n] for n in w})
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts/1.safetensors")
    index = {"weight_map": {"lm_head.weight": "parts/1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(models.load(folder).logits(x), expected)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    folder = copy_of("gpt2-gelu_new", tmp_path / "tied")
    rewrite_weights(folder, lambda x: x | {"lm_head.weight": x["transformer.wte.weight"]})
    assert leaves_equal(models.load(folder), models.load(GOLDENS / "gpt2-gelu_new"))
    rewrite_weights(folder, lambda x: x | {"lm_head.weight": 2 * x["transformer.wte.weight"]})
    refused("tie_word_embeddings", models.load, folder)


def test_hub_ids_come_from_the_local_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    copy_of("gpt2-untied", repository / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lm = models.load("someone/tiny")
    assert lm.name == "tiny" and leaves_equal(lm, models.load(GOLDENS / "gpt2-untied"))


def test_new_models_and_tokenizers_are_saved_and_loaded(tmp_path):
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lm = models.init(NARROW_LLAMA)
    models.save(lm, tmp_path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert models.load(tmp_path).tokenizer("b a").input_ids == [1, 0]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "tokenizer.json", alone)
    assert models.load_tokenizer(alone)("b a").input_ids == [1, 0]
    (alone / "tokenizer.json").write_text("{")
    refused("cannot be read", models.load_tokenizer, alone)
    lm, same, other = (models.init(NARROW_LLAMA, seed=n) for n in (1, 1, 2))
    assert leaves_equal(lm, same) and not leaves_equal(lm, other)
    logits = np.asarray(lm.logits(np.arange(8)[None, :]))
    assert 0 < np.abs(logits).max() < 0.5  # nearly uniform: the first loss is log(vocab_size)


@pytest.mark.parametrize(
    "path, message",
    [
        ("./nowhere", "no folder './nowhere'"),
        ("a/b/c", "no folder 'a/b/c'"),
        (" ", "name a folder"),
        (str(GOLDENS / "gpt2-relu" / "config.json"), "is a file; name the folder"),
        ("no-such-model", "hub cannot be reached.*docs-gpt2"),
        ("not an id!", "no public model on the hub; check the spelling"),
    ],
)
def test_models_that_are_not_there(path, message):
    refused(message, models.load, path)


@pytest.mark.parametrize(
    "variant, settings, message",
    [
        ("gpt2-relu", {"model_type": "bert"}, "'bert' is not one of gpt2, gpt_neox, llama"),
        ("gpt2-relu", {"activation_function": "tanh"}, "'tanh' is not implemented, only relu"),
        ("gpt2-relu", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt2-relu", {"n_embd": 33}, "33 does not divide into 4 heads"),
        ("gpt2-relu", {"n_layer": None}, "n_layer is missing"),
        ("gpt2-relu", {"n_layer": "3"}, "n_layer '3' must be int"),
        ("gpt2-relu", {"n_head": 0}, "n_head 0 must be at least 1"),
        ("llama-grouped-tied-old", {"num_key_value_heads": 0}, "num_key_value_heads 0 must be at"),
        ("llama-grouped-tied-old", {"head_dim": 2**25}, "head_dim 33554432 must be .* 16777216"),
        ("gpt2-relu", {"hidden_size": 64}, "contradict"),
        ("gpt2-relu", {"layer_norm_epsilon": math.nan}, "norm_eps nan must be at least 0"),
        ("gpt2-relu", {"layer_norm_epsilon": -1}, "norm_eps -1.0 must be at least 0"),
        ("llama-grouped-tied-old", {"rope_theta": math.inf}, "rope_theta inf must be at least 1"),
        ("gpt_neox-parallel-quarter-old", {"rotary_pct": math.nan}, "rotary_fraction nan must"),
        ("gpt2-relu", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama-grouped-tied-old", {"is_causal": False}, "is_causal False"),
        ("llama-grouped-tied-old", {"rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
        ("llama-grouped-tied-old", {"rope_scaling": "linear"}, "'linear' must be a JSON object"),
        ("llama-grouped-tied-old", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama-grouped-tied-old", {"num_key_value_heads": 3}, "cannot share 3"),
        ("llama-grouped-tied-old", {"hidden_size": "16"}, "hidden_size|head_dim"),
        ("llama-grouped-tied-old", {"head_dim": 7}, "must be even"),
        ("gpt_neox-parallel-quarter-old", {"rotary_pct": 0.2}, "Rotary dims 3 must be even"),
        ("gpt2-relu", {"n_layer": 4}, "lacks the weight 'transformer.h.3.ln_1.weight' and 11 more"),
        ("gpt2-relu", {"n_inner": 48}, r"c_fc.*shape \[.*config.json asks for"),
        ("llama-biases-wide-heads", {"mlp_bias": False}, "unknown weight .*mlp.*bias"),
    ],
)
def test_settings_that_do_not_fit(variant, settings, message, tmp_path):
    refused(message, models.load, copy_of(variant, tmp_path / "model", **settings))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x | {"transformer.extra": np.zeros(3)}, "unknown weight 'transformer.extra'"),
        (lambda x: x | {"transformer.ln_f.bias": np.full(32, np.nan)}, "ln_f.bias holds NaN or"),
        (lambda x: x | {"ln_f.bias": np.zeros(32, np.float32)}, "ln_f.bias' twice"),
        (lambda x: x | {"transformer.wpe.weight": np.zeros((24, 8), np.float32)}, "wpe.*shape"),
        (lambda x: x | {"transformer.wpe.weight": np.zeros((24, 32), np.int8)}, "is int8, which"),
    ],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    folder = copy_of("gpt2-relu", tmp_path / "model")
    rewrite_weights(folder, change)
    refused(message, models.load, folder)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "holds no JSON object"),
        ("model.safetensors", None, r"no model\.safetensors; .* save the model again"),
        ("model.safetensors", CUT_SHORT, "is damaged"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "holds no weight_map"),
        ("model.safetensors.index.json", SHARDED, "lacks the shard 'model-00001-of-00002"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "/etc/passwd"}}', "leads out"),
        ("model.safetensors.index.json", rb'{"weight_map": {"x": "a\u0000"}}', "lacks the shard"),
    ],
)
def test_files_that_are_missing_or_damaged(file, content, message, tmp_path):
    folder = copy_of("gpt2-relu", tmp_path / "model")
    (folder / file.removesuffix(".index.json")).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    refused(message, models.load, folder)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda lm: capture(lm, [[1]], [Site(31)]), r"31 is outside gpt2-relu \(3 layers: 0-2\)."),
        (lambda lm: Site(1, "resid_mid"), "'resid_mid' is unknown; use one of resid_pre"),
        (lambda lm: Site.parse("6"), "'6' is not KIND.LAYER"),
        (lambda lm: Site.parse("resid_pre.x"), "not KIND.LAYER, as in resid_pre.6"),
        (lambda lm: lm.logits([[0, 61]]), r"Token id 61 is outside gpt2-relu \(vocabulary of 61"),
        (lambda lm: lm.logits([[-1]]), "Token id -1 is outside"),
        (lambda lm: lm.logits([0, 1]), r"must be integers \[batch, seq\]"),
        (lambda lm: lm.logits([[0.5]]), "must be integers"),
        (lambda lm: lm.logits(np.zeros((1, 25), int)), r"25 tokens is longer.*\(24 positions\)"),
        (lambda lm: lm.logits([[1]], tap=lambda site, x: None), "returns nothing at resid_pre.0;"),
        (lambda lm: capture(lm, [[1]], "resid_pre.1"), r"'resid_pre.1' is no site; use Site\(6\)"),
        (lambda lm: models.save(lm, __file__), "test_models.py cannot be written.*move away"),
        (lambda lm: models.save(lm, "unused", dtype="int8"), "'int8', only as float32"),
        (lambda lm: lm.tokenizer, r"has no tokenizer.*only commands that read text need it"),
    ],
)
def test_calls_that_cannot_be_answered(call, message):
    refused(message, call, models.load(GOLDENS / "gpt2-relu"))
