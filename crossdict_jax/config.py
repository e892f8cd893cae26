"""Every setting of a run, as dataclasses with a unit or a reason beside each number."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

# A sweepable field takes one number or a tuple of them; each value becomes ensemble members.
Number = float | tuple[float, ...]
Count = int | tuple[int, ...]


@dataclass
class TextConfig:
    """Where documents come from and how they are cut and split."""

    source: str = "docstrings"  # docstrings | a file or folder (.txt .jsonl .parquet) | hf:NAME...
    column: str = "text"  # the text field of .jsonl and .parquet rows
    documents: int = 1000  # in total, before the split
    max_bytes: int = 2048  # per document, cut at a character; longer documents lose their tail
    window_tokens: int = 256  # at most, for every model; a smaller context of a model wins
    validation_fraction: float = 0.1
    test_fraction: float = 0.2


@dataclass
class ExtractConfig:
    """How language models are read."""

    batch_size: int = 32  # windows per forward, over all devices
    shard_windows: int = 512  # windows per file of the store: what a kill can lose
    norm_mask: float = 10.0  # rows whose norm exceeds this multiple of the median are dropped
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the language models' matrix products


@dataclass
class SAEConfig:
    """One ensemble of dictionaries: every model, layer and seed."""

    architecture: str = "topk"  # a file in crossdict_jax/dictionaries
    width: Count = 4096  # features
    k: Count = 32  # active features a row (topk)
    l1_coefficient: Number = 1.0  # relu: weight of the decoder-norm-weighted L1, after warm-up
    learning_rate: Number = 1e-3  # Adam, after warm-up, decayed linearly over the last fifth
    steps: int = 2500
    batch_size: int = 1024  # rows
    seeds: int = 1  # dictionaries per model and layer
    warmup_fraction: float = 0.05  # of the steps, for the learning rate
    l1_warmup_fraction: float = 0.1  # of the steps, for the L1 coefficient
    auxk_coefficient: float = 1 / 32  # topk: weight of the dead features' reconstruction (Gao 2024)
    k_aux: int = 0  # dead features that AuxK uses; 0 means d_model / 2
    dead_after_rows: int = 100_000  # a feature silent for this many rows (tokens) counts as dead
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the encoder and decoder products
    checkpoint_every: int = 500  # steps


@dataclass
class LossWeights:
    """Weights of the four losses of a trained map (each mean over the batch)."""

    mse: float = 1.0
    cosine: float = 1.0
    correlation: float = 0.05
    sparsity: float = 0.01


@dataclass
class MapConfig:
    """The rungs of the ladder, and how the trained one is trained."""

    kinds: tuple[str, ...] = ("mean", "token", "procrustes", "ridge", "token_ridge", "mlp")
    ridge_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance
    token_pseudocounts: tuple[float, ...] = (0.0, 1.0, 4.0, 16.0)  # shrinkage to the mean
    hidden: int = 512  # mlp: units of both hidden layers
    dropout: float = 0.1
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3  # AdamW, cosine decay
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    checkpoint_every: int = 500
    loss_weights: LossWeights = field(default_factory=LossWeights)


@dataclass
class EvaluationConfig:
    """How held-out numbers are made."""

    bootstrap: int = 200  # resamples of the test documents, for 95 % intervals
    pool: int = 0  # retrieval candidates; 0 means min(8192, rows)
    batch_size: int = 1024  # rows per forward of a map or dictionary


@dataclass
class InterventionConfig:
    """How much text the causal tests read."""

    documents: int = 64  # test documents at most
    batch_size: int = 16  # windows per forward


@dataclass
class Config:
    """A whole run: the models, their layers, and each stage's settings."""

    models: tuple[str, ...] = ()  # two or more directories or hub ids; () means the embedded pair
    layers: tuple[int, ...] = (5, 6, 7)  # one list for all models
    layer_pairs: str = ""  # "6:10,7:11" pairs layers of A and B; "" pairs equal layers
    site: str = "resid_pre"  # resid_pre | resid_post | attn_out | mlp_out
    seed: int = 0
    text: TextConfig = field(default_factory=TextConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    map: MapConfig = field(default_factory=MapConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)


@dataclass
class PretrainConfig:
    """A small language model of our own: its shape, its tokenizer, its training."""

    model_type: str = "gpt2"  # gpt2 | gpt_neox
    d_model: int = 128
    n_layers: int = 8
    n_heads: int = 4
    context: int = 256  # tokens
    vocab_size: int = 4096  # byte-level BPE, trained on the train split
    rotary_fraction: float = 0.25  # gpt_neox: share of each head that is rotated
    steps: int = 1500
    batch_size: int = 16  # windows of `context` tokens, over all devices
    learning_rate: float = 3e-3  # AdamW, linear warm-up, cosine decay to a tenth
    warmup_fraction: float = 0.03  # of the steps
    weight_decay: float = 0.1  # on matrices only
    gradient_clip: float = 1.0
    matmul_dtype: str = "float32"  # float32 | bfloat16
    checkpoint_every: int = 100  # steps
    save_dtype: str = "float16"  # float32 | float16 | bfloat16, of the safetensors file
    seed: int = 0
    text: TextConfig = field(default_factory=TextConfig)


def to_dict(config: Config) -> dict:
    """Returns the config as nested dicts of JSON values (tuples become lists)."""
    return dataclasses.asdict(config)
