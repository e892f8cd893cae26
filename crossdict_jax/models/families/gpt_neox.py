"""GPT-NeoX (Black et al. 2022), the shape of Pythia: partial rotary, attention beside the MLP."""

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.models import base
from crossdict_jax.models.base import LayerNorm, Linear
from crossdict_jax.models.base import ModelConfig as Config

KEYS = base.KEYS | {
    "intermediate_size": ("d_mlp",),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tied", False),
    "use_parallel_residual": ("parallel_residual", True),
    "rotary_pct": ("rotary_fraction", 0.25),
    "rotary_emb_base": ("rope_theta", 10000.0),
    "attention_bias": ("attention_bias", True),
}
SPELLINGS = {}
REFUSED_UNLESS = {"head_dim": None}
ARCHITECTURE = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."  # absent in files of the model without its head
# Name in the file -> our name.
WEIGHTS = {
    "gpt_neox.embed_in.weight": "W_E",
    "gpt_neox.final_layer_norm.weight": "final_norm.scale",
    "gpt_neox.final_layer_norm.bias": "final_norm.bias",
    "embed_out.weight": "W_U",
}
TRANSPOSED = True  # torch keeps matrices as [d_out, d_in]
BLOCK_PREFIX = "gpt_neox.layers.{layer}."
BLOCK_PARTS = {  # weight and bias of each part of a block
    "input_layernorm": "norm_1",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "post_attention_layernorm": "norm_2",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}


def prepare(raw: dict) -> dict:
    """config.json with the newer ``rope_parameters`` in the older spelling."""
    rope = raw["rope_parameters"]
    if "rope_theta" in rope:
        raw["rotary_emb_base"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        raw["rotary_pct"] = rope["partial_rotary_factor"]
    return raw


class Attention(base.Attention):
    """Multi-head attention; the shared matrix holds query, key, value head by head."""

    def __init__(self, config: Config, layer: int, rngs: nnx.Rngs):
        d_model, bias = config.d_model, config.attention_bias
        self.qkv = Linear(d_model, 3 * d_model, rngs, std=config.init_std, bias=bias)
        self.out = Linear(d_model, d_model, rngs, std=config.output_std, bias=bias)
        self.n_heads, self.scale = config.n_heads, config.d_head**-0.5

    def project(self, x: jax.Array, dtype: jnp.dtype):
        qkv = self.qkv(x, dtype).reshape(*x.shape[:2], self.n_heads, -1)
        return jnp.split(qkv, 3, axis=-1)


class Model(base.LanguageModel):
    norm, attention = LayerNorm, Attention
