"""Sites and taps, the residual block that every family shares, and the language model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import ops
from crossdict_jax.errors import UserError
from crossdict_jax.models.attention import attend, rotate
from crossdict_jax.models.folders import load_tokenizer
from crossdict_jax.modules import Params, Plain, plain

KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # in execution order
LARGEST = 2**24  # count in a config
KEYS = {  # of any config.json -> our field, and Hugging Face's value for an absent key
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("context",),
    "hidden_size": ("d_model",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "initializer_range": ("init_std", 0.02),
}
ACTIVATIONS = {  # by the names of transformers, several of which are one function
    "relu": jax.nn.relu,
    **dict.fromkeys(("gelu", "gelu_python"), partial(jax.nn.gelu, approximate=False)),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
        partial(jax.nn.gelu, approximate=True),
    ),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True, order=True)
class Site:
    """A point of the residual stream: ``resid_pre.6`` is what block 6 reads.

    ``attn_out`` and ``mlp_out`` are what the block adds to the stream.
    """

    layer: int
    kind: str = "resid_pre"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"Site kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}.")

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of a text as ``resid_pre.6``; UserError if it names none."""
        kind, _, layer = text.rpartition(".")
        if not kind or not layer.isascii() or not layer.isdigit():
            raise UserError(f"Site {text!r} is not KIND.LAYER, as in resid_pre.6.")
        return cls(layer=int(layer), kind=kind)


Tap = Callable[[Site, jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model; every family adds what only it has."""

    model_type: str
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's tokens
    context: int  # positions
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    activation: str
    norm_eps: float
    tied: bool  # the head is the embedding, transposed
    init_std: float = 0.02
    rotary_fraction: float | None = None  # of each head that turns with position; None: no rotary
    rope_theta: float = 10000.0
    parallel_residual: bool = False  # whether a block's attention and MLP read the same
    attention_bias: bool = True
    mlp_bias: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "context", "d_model", "n_heads", "d_mlp")
        limits = dict.fromkeys(sizes, (1, LARGEST))
        limits |= {"n_layers": (1, 2**10), "rope_theta": (1, 1e30)}
        limits |= dict.fromkeys(("norm_eps", "init_std"), (0, 1e30))
        if self.rotary_fraction is not None:
            limits["rotary_fraction"] = (0, 1)
        for field, (low, high) in limits.items():
            if not low <= (value := getattr(self, field)) <= high:
                raise UserError(f"{field} {value} must be at least {low} and at most {high}.")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"Activation {self.activation!r} is not implemented, only {', '.join(ACTIVATIONS)}."
            )
        if self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} does not divide into {self.n_heads} heads.")
        dims = self.rotary_dims
        if dims is not None and (dims % 2 or not 0 < dims <= self.d_head):
            raise UserError(
                f"Rotary dims {dims} must be even and between 2 and d_head {self.d_head}; "
                "change d_model or n_heads."
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_dims(self) -> int | None:
        return None if self.rotary_fraction is None else int(self.d_head * self.rotary_fraction)

    @property
    def output_std(self) -> float:
        """Initial scale of what is added to the stream (Radford et al. 2019, section 2.3)."""
        return self.init_std / (2 * self.n_layers) ** 0.5


def check_sites(config: ModelConfig, sites: Iterable[Site], name: str) -> tuple[Site, ...]:
    """Returns the sites; UserError if the model called ``name`` lacks a layer of theirs."""
    sites, n = (sites,) if isinstance(sites, Site | str) else tuple(sites), config.n_layers
    for site in sites:
        if not isinstance(site, Site):
            raise UserError(f"{site!r} is no site; use Site(6), or Site.parse('resid_pre.6').")
        if site.layer not in range(n):
            raise UserError(f"Site {site} is outside {name} ({n} layers: 0-{n - 1}).")
    return sites


class Past(NamedTuple):
    """What attention keeps of tokens read before: float32 [batch, capacity, heads, d_head].

    An absent layer looks back on nothing.
    """

    layers: dict[int, tuple[jax.Array, jax.Array]]  # {layer: (keys, values)}
    length: jax.Array  # int32 [batch], how many of them count


class Linear(nnx.Module):
    """``x W + b`` with W [d_in, d_out]; the products may be taken in a smaller dtype."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs, *, std: float, bias: bool = True):
        self.W = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.b = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        y = matmul(x, self.W[...], dtype)
        return y if self.b is None else y + self.b[...][None, None, :]


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over d_model."""

    def __init__(self, d_model: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(d_model))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale[...][None, None, :]


class LayerNorm(RMSNorm):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over d_model."""

    def __init__(self, d_model: int, *, eps: float):
        super().__init__(d_model, eps=eps)
        self.bias = nnx.Param(jnp.zeros(d_model))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x - x.mean(-1, keepdims=True)) + self.bias[...][None, None, :]


class MLP(nnx.Module):
    """``activation(x W_up + b_up) W_down + b_down``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d_model, d_mlp, bias = config.d_model, config.d_mlp, config.mlp_bias
        self.up = Linear(d_model, d_mlp, rngs, std=config.init_std, bias=bias)
        self.down = Linear(d_mlp, d_model, rngs, std=config.output_std, bias=bias)
        self.activation = config.activation

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x, dtype)), dtype)


class Attention(nnx.Module):
    """Causal attention; families give its ``scale``, ``out`` and ``project``.

    ``project(x, dtype)`` returns queries, keys and values [batch, seq, heads, d_head].
    """

    def __call__(self, x: jax.Array, rotary, dtype: jnp.dtype, past):
        query, key, value = self.project(x, dtype)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out = attend(query, key, value, scale=self.scale, dtype=dtype, past=past)
        return self.out(out, dtype), (key, value)


class Block(nnx.Module):
    """A residual block: attention and MLP in sequence, or both on the same input."""

    def __init__(self, layer: int, config: ModelConfig, rngs: nnx.Rngs, *, norm, attention, mlp):
        self.norm_1 = norm(config.d_model, eps=config.norm_eps)
        self.norm_2 = norm(config.d_model, eps=config.norm_eps)
        self.attention, self.mlp = attention(config, layer, rngs), mlp(config, rngs)
        self.layer, self.parallel = layer, config.parallel_residual

    def __call__(self, x, rotary, tap: Tap, dtype: jnp.dtype, past):
        """Returns the stream after the block, and the keys and values of its attention."""
        x = tap(Site(self.layer, "resid_pre"), x)  # [batch, seq, d_model]
        attn_out, kept = self.attention(self.norm_1(x), rotary, dtype, past)
        attn_out = tap(Site(self.layer, "attn_out"), attn_out)
        middle = x + attn_out
        mlp_out = self.mlp(self.norm_2(x if self.parallel else middle), dtype)
        mlp_out = tap(Site(self.layer, "mlp_out"), mlp_out)
        return tap(Site(self.layer, "resid_post"), middle + mlp_out), kept


class LanguageModel(Plain):
    """A causal language model with float32 parameters and residual stream.

    Families say of what its blocks are made. Static: ``config``, ``name``, ``path``, ``dtype``.
    """

    norm: type
    attention: type[Attention]
    mlp: type = MLP

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.name = config.model_type
        self.path = ""  # the folder it was loaded from
        self.dtype = "float32"  # of the inputs of matrix products, where a call names none
        vocab, d_model, embedded = config.vocab_size, config.d_model, config.rotary_fraction is None
        shapes = {
            "W_E": (vocab, d_model),
            "W_U": None if config.tied else (d_model, vocab),
            "W_pos": (config.context, d_model) if embedded else None,
        }
        for name, shape in shapes.items():
            x = shape and nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))
            setattr(self, name, x)
        parts = {"norm": self.norm, "attention": self.attention, "mlp": self.mlp}
        layers = range(config.n_layers)
        self.blocks = nnx.List([Block(i, config, rngs, **parts) for i in layers])
        self.final_norm = self.norm(config.d_model, eps=config.norm_eps)

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Returns [batch, seq, d_model]; positions int [batch, seq] default to 0, 1, ..."""
        x = self.W_E[...][tokens]
        if self.W_pos is None:
            return x
        W_pos = self.W_pos[...]
        return x + (W_pos[None, : tokens.shape[1]] if positions is None else W_pos[positions])

    def rotary(self, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """cos and sin [length, dims / 2] for ``rotate`` (Su et al. 2021, section 3.2).

        None where positions are embedded.
        """
        dims, theta = self.config.rotary_dims, self.config.rope_theta
        if dims is None:
            return None
        exponent = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        frequency = 1 / np.float32(theta) ** exponent
        angle = np.arange(length, dtype=np.float32)[:, None] * frequency[None, :]
        return np.cos(angle), np.sin(angle)

    def logits(self, tokens, tap: Tap | None = None, dtype=None) -> jax.Array:
        """Next-token logits, float32 [batch, seq, vocab_size], of int tokens [batch, seq].

        ``tap(site, x)`` is called at every site in execution order; the rest of the model reads
        what it returns. Padding on the right changes nothing before it. ``dtype`` is that of the
        inputs of matrix products (sums stay float32); float32 is exact on any device.
        """
        return self.extend(tokens, tap=tap, dtype=dtype)[0]

    def extend(
        self, tokens, past: Past | None = None, *, tap: Tap | None = None, dtype=None
    ) -> tuple[jax.Array, dict[int, tuple[jax.Array, jax.Array]]]:
        """Logits of tokens [batch, seq] that follow ``past``, and {layer: (keys, values)}.

        The tokens stand at positions ``past.length`` and on (each row its own), or 0 and on. Keys
        and values are [batch, seq, heads, d_head] of these tokens alone, to make a later ``Past``
        of. Reading a text in pieces or as a whole gives the same; that the pieces are together no
        longer than the model reads is not checked.
        """
        x, kept = self.final_stream(tokens, past, tap=tap, dtype=dtype)
        return self.unembed(x, dtype), kept

    def unembed(self, x: jax.Array, dtype=None) -> jax.Array:
        """Logits [batch, seq, vocab_size] of the stream after the last block."""
        W_U = self.W_E[...].T if self.W_U is None else self.W_U[...]
        return matmul(self.final_norm(x), W_U, jnp.dtype(dtype or self.dtype))

    def final_stream(
        self, tokens, past: Past | None = None, *, tap: Tap | None = None, dtype=None
    ) -> tuple[jax.Array, dict[int, tuple[jax.Array, jax.Array]]]:
        """``extend`` without the logits: the stream after the last block [batch, seq, d_model]."""
        tokens = check_tokens(self.config, tokens, self.name)
        seen, kept = {}, {}
        if past is None:
            x, rotary = self.embed(tokens), self.rotary(tokens.shape[1])
        else:
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = past.length[:, None] + steps[None, :]
            x, some = self.embed(tokens, positions), next(iter(past.layers.values()))
            tables = self.rotary(some[0].shape[1] + tokens.shape[1])
            rotary = tables and tuple(jnp.asarray(table)[positions] for table in tables)
            nothing = tuple(keys[:, :0] for keys in some)
            layers = range(len(self.blocks))
            seen = {i: (*past.layers.get(i, nothing), past.length) for i in layers}
        dtype = jnp.dtype(dtype or self.dtype)

        def tapped(site: Site, x: jax.Array) -> jax.Array:
            if (read := tap(site, x) if tap else x) is None:
                raise UserError(f"The tap returns nothing at {site}; let it return x.")
            return read

        for i, block in enumerate(self.blocks):
            x, kept[i] = block(x, rotary, tapped, dtype, seen.get(i))
        return x, kept

    @property
    def tokenizer(self):
        """The transformers tokenizer beside the weights; UserError if there is none."""
        return load_tokenizer(self.path)


@plain
def capture(lm: LanguageModel, tokens, sites: Iterable[Site], dtype=None) -> dict[Site, jax.Array]:
    """``{site: float32 [batch, seq, d_model]}`` of int tokens [batch, seq].

    Nothing after the last captured site is computed.
    """
    sites = check_sites(lm.config, sites, lm.name)
    tokens = check_tokens(lm.config, tokens, lm.name)
    graphdef, state = nnx.split(lm)
    return dict(zip(sites, _capture(graphdef, state, tokens, sites, jnp.dtype(dtype or lm.dtype))))


@partial(jax.jit, static_argnames=("graphdef", "sites", "dtype"))
def _capture(graphdef, state, tokens, sites, dtype) -> tuple[jax.Array, ...]:
    return captured(nnx.merge(graphdef, state), sites, tokens, dtype)


def captured(lm: LanguageModel, sites: tuple[Site, ...], tokens, dtype=None):
    """``capture`` inside a compiled program: a tuple, in the order of the sites."""
    seen: dict[Site, jax.Array] = {}
    lm.logits(tokens, tap=seen.setdefault, dtype=dtype)
    return tuple(seen[site] for site in sites)


def check_tokens(config: ModelConfig, tokens, name: str) -> jax.Array:
    """Tokens as an array [batch, seq]; UserError if the model cannot read them."""
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f"Tokens must be integers [batch, seq], not {tokens.dtype} {list(tokens.shape)}."
        )
    if tokens.shape[1] > config.context:
        raise UserError(
            f"A sequence of {tokens.shape[1]} tokens is longer than {name} reads "
            f"({config.context} positions); cut the text first."
        )
    # Traced ids, or ids of other processes, cannot be looked at. By numpy, as under jit jnp would
    # trace even a known array.
    traced = isinstance(tokens, jax.core.Tracer)
    if tokens.size and not traced and getattr(tokens, "is_fully_addressable", True):
        ids = np.asarray(tokens)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"Token id {low if low < 0 else high} is outside {name} (vocabulary of "
                f"{config.vocab_size}: 0-{config.vocab_size - 1}); is this its own tokenizer?"
            )
    return jnp.asarray(tokens, jnp.int32)


def rounded(params: Params, dtype: jnp.dtype) -> Params:
    """Returns a model's parameters with the weights that only products read as ``dtype``.

    Products round them anyway; kept so, they are read at twice the speed.
    """

    def round_(path, value):
        if path[-1].key not in ("W", "W_U") or value.dtype == dtype:
            return value
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, dtype)
        return value.astype(dtype)

    return jax.tree_util.tree_map_with_path(round_, params)


def matmul(x: jax.Array, W: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x W`` with inputs in ``dtype``, also those of the gradient's products; float32 sums."""
    if dtype == jnp.float32:
        return ops.exact(x, W.astype(dtype))
    rows = ops.matmul(x.reshape(-1, x.shape[-1]), W.astype(jnp.float32), dtype)
    return rows.reshape(*x.shape[:-1], -1)
