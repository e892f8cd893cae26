"""Trains a GPT-2 or GPT-NeoX from nothing on the train split of a corpus."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from crossdict_jax import models, modules
from crossdict_jax.activations.text import Corpus, load_corpus
from crossdict_jax.config import PretrainConfig
from crossdict_jax.errors import UserError
from crossdict_jax.models.run import Runner
from crossdict_jax.pretraining.baselines import bigram_loss, unigram_loss
from crossdict_jax.pretraining.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard
from crossdict_jax.workdir import write_json


def train_language_model(config: PretrainConfig, directory: Path) -> dict:
    """Trains one model and writes it to ``directory/model`` in Hugging Face format.

    Killed and run again, it goes on and ends with the same bits.

    Returns:
      Held-out nats per token of the model, a bigram and a unigram (test documents), and counts.
    """
    corpus = load_corpus(config.text)
    tokenizer = _tokenizer(config, corpus, directory)
    tokens = {s: _tokens(tokenizer, corpus, s) for s in ("train", "test")}
    if len(tokens["train"]) < config.context + 1:
        raise UserError(
            f"text.source={config.text.source} gives {len(tokens['train'])} training tokens, fewer "
            f"than one window of {config.context}; add documents."
        )
    params = _train(config, tokens["train"], directory)
    return _save(config, params, tokenizer, tokens, corpus, directory)


def hf_config(config: PretrainConfig) -> dict:
    """Returns the Hugging Face ``config.json`` of the model that ``config`` describes."""
    shared = {"vocab_size": config.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if config.model_type == "gpt2":
        return shared | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_positions": config.context,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
    if config.model_type == "gpt_neox":
        return shared | {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "intermediate_size": 4 * config.d_model,
            "max_position_embeddings": config.context,
            "rotary_pct": config.rotary_fraction,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    raise UserError(f"model_type={config.model_type} cannot be trained; use gpt2 or gpt_neox.")


def _tokenizer(config: PretrainConfig, corpus: Corpus, directory: Path):
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        texts = (d.text for d in corpus.split("train"))
        tokenizer = train_tokenizer(
            texts, vocab_size=config.vocab_size, nfc=config.model_type == "gpt_neox"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"vocab_size={config.vocab_size} needs more text: the corpus gave "
            f"{tokenizer.get_vocab_size()} entries; lower vocab_size."
        )
    return tokenizer


def _tokens(tokenizer, corpus: Corpus, split: str) -> np.ndarray:
    """All documents of a split in one row of ids, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch([d.text for d in corpus.split(split)])
    parts = [np.append(np.asarray(e.ids, np.int32), end) for e in encoded]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def schedule(config: PretrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup_steps=math.ceil(config.warmup_fraction * config.steps),
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )


def _optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for embeddings, head, norms and biases.

    Muon (Jordan 2024), scaled to Adam's update size (Liu et al. 2025, arXiv 2502.16982) so that
    one rate serves both, reaches in 50 steps of the embedded GPT-2 shape what AdamW needs several
    times as many for.
    """
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        muon(
            schedule(config),
            weight_decay=config.weight_decay,
            weight_decay_mask=matrices,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_matrices,
        ),
    )


def _muon_matrices(params):
    def choose(path, p):
        in_block = path[0].key == "blocks"
        return MuonDimensionNumbers() if in_block and p.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(choose, params)


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns nats per predicted token [batch, seq - 1] of logits [batch, seq, vocab]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def _train(config: PretrainConfig, tokens: np.ndarray, directory: Path):
    mesh = make_mesh()
    optimizer = _optimizer(config)
    graphdef, _ = modules.split(models.init(hf_config(config), seed=config.seed))
    dtype = jnp.dtype(config.matmul_dtype)

    def init(key):
        _, params = modules.split(models.init(hf_config(config), seed=key))
        return {"params": params, "train": optimizer.init(params)}

    def loss_of(params, batch):
        lm = modules.merge(graphdef, params)
        return next_token_loss(lm.logits(batch, dtype=dtype), batch).mean()

    def step(state, batch, _, __):
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, train_state = optimizer.update(grads, state["train"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "train": train_state}, {"loss": loss}

    state = train(
        Trainable(init, step),
        feed=_feed(config, tokens, mesh),
        steps=config.steps,
        seed=config.seed,
        directory=Path(directory),
        checkpoint_every=config.checkpoint_every,
        what=f"train {config.model_type}",
        state_shardings=lambda abstract: jax.tree.map(lambda _: shard(mesh), abstract),
        meta=dataclasses.asdict(config),
    )
    return state["params"]


def _feed(config: PretrainConfig, tokens: np.ndarray, mesh) -> Feed:
    """Windows of ``context`` tokens; each epoch cuts the text at another offset."""
    n, context = (len(tokens) - config.context) // config.context, config.context
    n = max(n, 1)

    def indices(first: int, count: int):
        places = np.arange(first * config.batch_size, (first + count) * config.batch_size)
        order = epoch_order(config.seed, start=places[0], count=len(places), n=n).astype(np.int64)
        offset = (places // n * 97) % context
        starts = np.minimum(order * context + offset, len(tokens) - context)
        return starts.reshape(count, config.batch_size).astype(np.int32)

    def select(resident, starts):
        batch = resident[starts[:, None] + jnp.arange(context)[None, :]]
        return jax.lax.with_sharding_constraint(batch.astype(jnp.int32), shard(mesh, DATA))

    return Feed(put(tokens, shard(mesh)), indices, select)


def held_out_loss(lm, tokens: np.ndarray, *, batch_size: int = 32) -> float:
    """Returns mean nats per token over consecutive windows of one context each."""
    context = lm.config.context
    n = len(tokens) // context
    if n == 0:
        raise UserError(f"{len(tokens)} held-out tokens are fewer than one context of {context}.")
    windows = tokens[: n * context].reshape(n, context)
    losses = Runner(lm, batch_size=batch_size).token_losses(windows)
    return float(losses.mean(axis=1, dtype=np.float64).mean())


def _save(config, params, tokenizer, tokens, corpus, directory) -> dict:
    out = Path(directory) / "model"
    lm = models.init(hf_config(config), seed=config.seed)
    graphdef, _ = modules.split(lm)
    models.save(modules.merge(graphdef, params), out, dtype=config.save_dtype)
    save_tokenizer(tokenizer, out, context=config.context)
    held_out, fit = tokens["test"], tokens["train"]
    result = {
        "loss": held_out_loss(models.load(str(out)), held_out),
        "bigram_loss": bigram_loss(fit, held_out, vocab_size=config.vocab_size),
        "unigram_loss": unigram_loss(fit, held_out, vocab_size=config.vocab_size),
        "test_tokens": len(held_out),
        "train_tokens": len(fit),
        "tokens_seen": config.steps * config.batch_size * config.context,
        "parameters": sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params)),
        "text": corpus.provenance,
    }
    write_json(out / "training.json", result | {"config": dataclasses.asdict(config)})
    draw_loss_curve(Path(directory), result)
    return json.loads((out / "training.json").read_text())


def draw_loss_curve(directory: Path, result: dict) -> None:
    """Draws ``directory/loss.svg``: training loss by step beside the held-out losses."""
    from matplotlib.figure import Figure

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training")
    for style, name in (("-", "loss"), ("--", "bigram_loss"), (":", "unigram_loss")):
        label = f"held out: {name.replace('_loss', '').replace('loss', 'model')}"
        axes.axhline(result[name], linestyle=style, color="0.4", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend()
    figure.savefig(directory / "loss.svg")
