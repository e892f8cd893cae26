"""Trains a GPT-2 or GPT-NeoX from scratch on the train split of a corpus."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from crossdict_jax import models, modules
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.config import PretrainConfig
from crossdict_jax.errors import UserError
from crossdict_jax.models.run import Runner, token_losses
from crossdict_jax.pretraining.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from crossdict_jax.training import checkpoint
from crossdict_jax.training.ensemble import Ensemble, Objective
from crossdict_jax.training.loop import Feed, epoch_order, train
from crossdict_jax.training.mesh import DATA, make_mesh, product_dtype, put, shard
from crossdict_jax.workdir import AGAIN, write_json, write_text

WARMUP = 0.03  # of the steps; then cosine decay to a tenth of the rate
WEIGHT_DECAY = 0.1  # of the matrices in blocks
GRADIENT_CLIP = 1.0  # norm, as in GPT-3 and Pythia
MATRIX = MuonDimensionNumbers()
SIZES = ("d_model", "n_layers", "n_heads", "context")
NEOX = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
NAMES = {"gpt2": ("n_embd", "n_layer", "n_head", "n_positions"), "gpt_neox": NEOX}  # of SIZES
OFFSET = 97  # tokens by which each epoch cuts the text further on; prime: most cuts differ


def train_language_model(config: PretrainConfig, directory: Path) -> dict:
    """Trains a model and writes it to ``directory/model`` in Hugging Face format.

    Interrupted and run again, it ends with the same bits. Returns nats per token of the model, a
    bigram and a unigram on test documents, and counts.
    """
    from tokenizers import Tokenizer

    objective = NextToken(config)  # whose shapes are checked before anything is written
    corpus, tokens, label = load_corpus(config.text), [], config.model_type
    file = directory / "tokenizer.json"
    if not file.exists() or not checkpoint.latest_step(directory / "checkpoints"):
        directory.mkdir(parents=True, exist_ok=True)
        texts, nfc = (d.text for d in corpus.split("train")), label == "gpt_neox"
        trained = train_tokenizer(texts, vocab_size=config.vocab_size, nfc=nfc)
        if trained.get_vocab_size() != config.vocab_size:  # before anything is written
            raise UserError(
                f"vocab_size={config.vocab_size} needs more text: this gave "
                f"{trained.get_vocab_size()} entries; lower vocab_size."
            )
        write_text(file, trained.to_str(pretty=True))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library's are bare
        raise UserError(f"{file} is damaged ({error}); {AGAIN}.") from error
    end = tokenizer.token_to_id(END_OF_TEXT)
    for split in ("train", "test"):  # all documents in one row, each ended by the same token
        encoded = tokenizer.encode_batch([d.text for d in corpus.split(split)])
        tokens.append(np.concatenate([np.array([*e.ids, end], np.int32) for e in encoded]))
    fit, held_out = tokens
    if len(fit) < config.context + 1:
        raise UserError(
            f"text.source={config.text.source} gives {len(fit)} training tokens, fewer "
            f"than one window of {config.context}; add documents."
        )
    windows = held_out[: len(held_out) // config.context * config.context]
    if not len(windows):
        raise UserError(
            f"{len(held_out)} held-out tokens are fewer than one context of {config.context}."
        )
    mesh, fixed = make_mesh(), {"id": np.zeros(1, np.int32)}
    (params,) = train(
        Ensemble(objective, _window_feed(config, fit, mesh, fixed), fixed, (label,), mesh),
        steps=config.steps,
        seed=config.seed,
        directory=directory,
        checkpoint_every=config.checkpoint_every,
        title=f"train {label}",
        meta=dataclasses.asdict(config) | {"corpus": corpus.provenance["sha256"]},
    )
    out = directory / "model"
    models.save(modules.merge(objective.graphdef, params), out, dtype=config.save_dtype)
    save_tokenizer(tokenizer, out, context=config.context)
    runner = Runner(models.load(out), batch_size=32)
    losses = runner.run(token_losses, windows.reshape(-1, config.context))
    result = {
        "loss": float(losses.mean(axis=1, dtype=np.float64).mean()),
        "bigram_loss": bigram_loss(fit, held_out, vocab_size=config.vocab_size),
        "unigram_loss": unigram_loss(fit, held_out, vocab_size=config.vocab_size),
        "test_tokens": len(held_out),
        "train_tokens": len(fit),
        "tokens_seen": config.steps * config.batch_size * config.context,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "text": corpus.provenance,
    }
    write_json(out / "training.json", result | {"config": dataclasses.asdict(config)})
    return result


class NextToken(Objective):
    """Next-token prediction on windows of text.

    Muon (Jordan 2024) for the blocks' matrices, scaled to Adam's update size (Liu et al. 2025,
    arXiv 2502.16982) so that one rate serves both, and Adam for embeddings, head, norms and biases.
    On the embedded GPT-2 shape 50 steps reach what AdamW needs several times as many for.
    """

    def __init__(self, config: PretrainConfig):
        if config.model_type not in NAMES:
            raise UserError(
                f"model_type={config.model_type} cannot be trained; use gpt2 or gpt_neox."
            )
        # What config.json does not say is as Hugging Face has it.
        raw = {name: getattr(config, name) for name in ("model_type", "vocab_size")}
        raw |= {n: getattr(config, size) for n, size in zip(NAMES[config.model_type], SIZES)}
        raw |= {"bos_token_id": 0, "eos_token_id": 0}
        raw |= {"intermediate_size": 4 * config.d_model} if "hidden_size" in raw else {}
        self.config, self.raw = config, raw
        self.graphdef, _ = modules.abstract(lambda: models.init(raw))

    def init(self, key, fixed):
        return modules.split(models.init(self.raw, seed=self.config.seed))[1]

    def optimizer(self, fixed) -> optax.GradientTransformation:
        config = self.config
        rate = optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            warmup_steps=math.ceil(WARMUP * config.steps),
            decay_steps=config.steps,
            end_value=config.learning_rate / 10,
        )
        return optax.chain(
            optax.clip_by_global_norm(GRADIENT_CLIP),
            muon(
                rate,
                weight_decay=WEIGHT_DECAY,
                adam_b2=0.95,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                    lambda path, p: MATRIX if path[0].key == "blocks" and p.ndim == 2 else None,
                    params,
                ),
            ),
        )

    def loss(self, params, batch, context):
        lm = modules.merge(self.graphdef, params)
        logits = lm.logits(batch, dtype=product_dtype(self.config.matmul_dtype))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:])
        return losses.mean(), ({}, None)


def _window_feed(config: PretrainConfig, tokens: np.ndarray, mesh, fixed: dict) -> Feed:
    """Windows of ``context`` tokens; each epoch cuts the text at another offset."""
    context = config.context
    n = max((len(tokens) - context) // context, 1)

    def indices(first: int, count: int):
        index = np.arange(first * config.batch_size, (first + count) * config.batch_size)
        order = epoch_order(config.seed, start=index[0], count=len(index), n=n).astype(np.int64)
        offset = (index // n * OFFSET) % context
        starts = np.minimum(order * context + offset, len(tokens) - context)
        return starts.reshape(count, config.batch_size).astype(np.int32)

    def select(resident, starts):
        batch = resident["tokens"][starts[:, None] + jnp.arange(context)[None, :]]
        batch = jax.lax.with_sharding_constraint(batch.astype(jnp.int32), shard(mesh, DATA))
        return {"rows": batch[None], "fixed": resident["fixed"]}

    return Feed(put({"tokens": tokens, "fixed": fixed}, shard(mesh)), indices, select)


def unigram_loss(train: np.ndarray, test: np.ndarray, *, vocab_size: int) -> float:
    """Returns mean nats per token of ``test`` under add-one unigram counts; ids are [n]."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts[test] / counts.sum()).mean())


def bigram_loss(train: np.ndarray, test: np.ndarray, *, vocab_size: int) -> float:
    """Returns nats per token of ``test[1:]`` under an interpolated bigram model of ``train``.

    Interpolated with the unigram by Witten and Bell's rule (1991): the more different successors a
    token had, the more weight the unigram gets.
    """
    pairs, wanted = (ids[:-1].astype(np.int64) * vocab_size + ids[1:] for ids in (train, test))
    keys, counts = np.unique(pairs, return_counts=True)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[index] == wanted, counts[index], 0)
    total, kinds = (  # of the token before: how often it was followed, and by how many
        np.bincount(ids, minlength=vocab_size)[test[:-1]]
        for ids in (train[:-1], keys // vocab_size)
    )
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    weight = np.maximum(total + kinds, 1)
    share = np.where(total > 0, kinds / weight, 1.0)
    return float(-np.log(seen / weight + share * unigram[test[1:]]).mean())
