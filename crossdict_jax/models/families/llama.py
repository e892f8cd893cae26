"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, gated MLP, grouped-query attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.errors import UserError
from crossdict_jax.models import base
from crossdict_jax.models.base import ACTIVATIONS, MLP, Linear, RMSNorm


@dataclass(frozen=True, kw_only=True)
class Config(base.ModelConfig):
    """Llama's own settings: heads of keys and values, and their size."""

    n_kv_heads: int
    head_dim: int  # its own number: heads together may be wider than d_model
    rotary_fraction: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads evenly."
            )

    @property
    def d_head(self) -> int:
        return self.head_dim


KEYS = base.KEYS | {
    "num_key_value_heads": ("n_kv_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("d_mlp",),
    "hidden_act": ("activation", "silu"),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
    "rope_theta": ("rope_theta", 10000.0),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
SPELLINGS = {}
REFUSED_UNLESS = {"partial_rotary_factor": 1.0}
ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."  # absent in files of the model without its head
# Name in the file -> our name.
WEIGHTS = {
    "model.embed_tokens.weight": "W_E",
    "model.norm.weight": "final_norm.scale",
    "lm_head.weight": "W_U",
}
TRANSPOSED = True  # torch keeps matrices as [d_out, d_in]
BLOCK_PREFIX = "model.layers.{layer}."
BLOCK_PARTS = {  # weight and, if it has one, bias of each part of a block
    "input_layernorm": "norm_1",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "norm_2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def prepare(raw: dict) -> dict:
    """config.json with ``rope_parameters`` flat and the head counts written out."""
    raw |= raw["rope_parameters"]
    size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.get("head_dim") is None and type(size) is type(heads) is int and heads > 0:
        raw["head_dim"] = size // heads
    return raw


class Attention(base.Attention):
    """Attention in which each key-value head serves a run of query heads (Ainslie et al. 2023)."""

    def __init__(self, config: Config, layer: int, rngs: nnx.Rngs):
        d_model, d_head, bias = config.d_model, config.d_head, config.attention_bias
        d_query, d_key = config.n_heads * d_head, config.n_kv_heads * d_head
        self.query = Linear(d_model, d_query, rngs, std=config.init_std, bias=bias)
        self.key = Linear(d_model, d_key, rngs, std=config.init_std, bias=bias)
        self.value = Linear(d_model, d_key, rngs, std=config.init_std, bias=bias)
        self.out = Linear(d_query, d_model, rngs, std=config.output_std, bias=bias)
        self.d_head, self.scale = d_head, d_head**-0.5

    def project(self, x: jax.Array, dtype: jnp.dtype):
        shape = (*x.shape[:2], -1, self.d_head)
        return [part(x, dtype).reshape(shape) for part in (self.query, self.key, self.value)]


class GatedMLP(MLP):
    """``(activation(x W_gate) * x W_up) W_down`` (Shazeer 2020)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        std, bias = config.init_std, config.mlp_bias
        self.gate = Linear(config.d_model, config.d_mlp, rngs, std=std, bias=bias)
        super().__init__(config, rngs)

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        gate = ACTIVATIONS[self.activation](self.gate(x, dtype))
        return self.down(gate * self.up(x, dtype), dtype)


class Model(base.LanguageModel):
    norm, attention, mlp = RMSNorm, Attention, GatedMLP
