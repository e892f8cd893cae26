"""GPT-2 (Radford et al. 2019): learned positions, blocks in sequence, usually a tied head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.models import base
from crossdict_jax.models.base import LayerNorm, Linear


@dataclass(frozen=True, kw_only=True)
class Config(base.ModelConfig):
    """GPT-2's own settings: how attention scores are scaled."""

    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


SPELLINGS = {  # of ``base.KEYS`` in config.json; their usual names are understood too
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
KEYS = {SPELLINGS.get(key, key): field for key, field in base.KEYS.items()} | {
    "n_inner": ("d_mlp",),
    "activation_function": ("activation", "gelu_new"),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tied", True),
    "scale_attn_weights": ("scale_attn_weights", True),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
}
REFUSED_UNLESS = {"add_cross_attention": False}
ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."  # absent in files of the model without its head
# Name in the file -> our name.
WEIGHTS = {
    "transformer.wte.weight": "W_E",
    "transformer.wpe.weight": "W_pos",
    "transformer.ln_f.weight": "final_norm.scale",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "W_U",
}
TRANSPOSED = False  # every matrix of a block is already [d_in, d_out]
BLOCK_PREFIX = "transformer.h.{layer}."
BLOCK_PARTS = {  # weight and bias of each part of a block
    "ln_1": "norm_1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm_2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def prepare(raw: dict) -> dict:
    """config.json with ``n_inner`` written out."""
    if raw.get("n_inner") is None and isinstance(raw.get("n_embd"), int):
        raw["n_inner"] = 4 * raw["n_embd"]
    return raw


class Attention(base.Attention):
    """Multi-head attention whose query, key and value share one matrix."""

    def __init__(self, config: Config, layer: int, rngs: nnx.Rngs):
        d_model = config.d_model
        self.qkv = Linear(d_model, 3 * d_model, rngs, std=config.init_std)
        self.out = Linear(d_model, d_model, rngs, std=config.output_std)
        self.n_heads = config.n_heads
        self.scale = config.d_head**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def project(self, x: jax.Array, dtype: jnp.dtype):
        qkv = self.qkv(x, dtype).reshape(*x.shape[:2], 3, self.n_heads, -1)
        return [qkv[:, :, i] for i in range(3)]


class Model(base.LanguageModel):
    norm, attention = LayerNorm, Attention
