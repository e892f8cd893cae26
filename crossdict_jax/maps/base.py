"""What every rung shares: paired rows, the map protocol, and map checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import dictionaries, modules
from crossdict_jax.config import map_kinds
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.maps.compact import Compact, compact
from crossdict_jax.training import load_meta, load_params, save_module

ROWS = 4096  # rows per dispatch of the closed forms


@dataclass(frozen=True)
class Side:
    """One model's half of paired rows.

    Attributes:
      x: activations [n, d_model], bfloat16 or float32, on the host.
      tokens: int32 [n], the model's own token that ends at the position.
      dictionary: the sparse dictionary of this model at this site.
      model, layer: what was read; a rung that is asked about other layers needs to know.
      token_bytes: gives, by token id, the bytes of text that a token stands for; None where all
        sides count tokens in one vocabulary.
      reordered_from: the side that holds the same rows in another order, if there is one.
      order: int [n], where in that side each row stands.
      keys: int [n, 2], (document, byte end) of each row, by which ``Pairs`` sees that both sides
        are the same places of the same text; None where nobody says.
    """

    x: np.ndarray
    tokens: np.ndarray
    dictionary: Dictionary
    model: str = ""
    layer: int = 0
    token_bytes: Callable[[], Sequence[bytes]] | None = None
    reordered_from: Side | None = None
    order: np.ndarray | None = None
    keys: np.ndarray | None = None

    @cached_property
    def bad_row(self) -> int | None:
        """The first row that holds NaN or infinity, before any reordering; None if none does."""
        if self.reordered_from is not None:
            return self.reordered_from.bad_row
        for rows in slices(len(self.x)):
            bad = ~np.isfinite(self.x[rows].astype(np.float32)).all(axis=1)
            if bad.any():
                return rows.start + int(bad.argmax())
        return None

    @cached_property
    def feature_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, float64 [width], of the features; encoded once, in batches."""
        if self.reordered_from is not None:
            return self.reordered_from.feature_moments
        total, square = np.zeros((2, self.dictionary.width))
        for rows in slices(len(self.x)):
            f = encode_rows(self.dictionary, self.x[rows])
            total += f.sum(0, dtype=np.float64)
            square += np.square(f).sum(0, dtype=np.float64)
        mean = total / len(self.x)
        return mean, np.maximum(square / len(self.x) - mean**2, 0.0)

    @cached_property
    def code(self) -> Compact | None:
        """The active features of all rows, on the host; None where the rows take less memory.

        That is where some row has more than d_model / 2 active features.
        """
        if self.reordered_from is not None:
            code = self.reordered_from.code
            return jax.tree.map(lambda a: a[self.order], code)
        encoded = (encode_rows(self.dictionary, self.x[rows]) for rows in slices(len(self.x)))
        return compact(encoded, most=self.x.shape[1] // 2)

    def take(self, rows: np.ndarray | slice) -> Side:
        """Returns the side with these rows alone."""
        keys = None if self.keys is None else self.keys[rows]
        own = {"x": self.x[rows], "tokens": self.tokens[rows], "keys": keys}
        return dataclasses.replace(self, **own, reordered_from=None, order=None)

    def reordered(self, order: np.ndarray) -> Side:
        """Returns the side with its rows in the given order."""
        rows = {"x": self.x[order], "tokens": self.tokens[order]}
        return dataclasses.replace(self, **rows, reordered_from=self, order=order, keys=None)


@dataclass(frozen=True)
class Pairs:
    """Rows of A (source) and B (target); row i of both is one text position, unless shuffled.

    Attributes:
      documents: int32 [n], the document of the source row.
    """

    source: Side
    target: Side
    documents: np.ndarray

    def __post_init__(self):
        a, b = self.source, self.target
        rows = {len(a.x), len(a.tokens), len(b.x), len(b.tokens), len(self.documents)}
        if len(rows) > 1:
            raise UserError(
                f"Pairs need equally many rows: the source has {len(a.x)} and {len(a.tokens)} "
                f"tokens, the target {len(b.x)} and {len(b.tokens)}, with {len(self.documents)} "
                "documents; take both sides from the same rows."
            )
        if a.keys is None or b.keys is None or np.array_equal(a.keys, b.keys):
            return
        row = int(np.argmax((a.keys != b.keys).any(axis=1)))
        places = [f"document {d}, byte {end}" for d, end in (a.keys[row], b.keys[row])]
        raise UserError(
            f"Row {row} is {places[0]} in the source and {places[1]} in the target: these are not "
            "the same places of the same text; take both sides from one store."
        )

    def __len__(self) -> int:
        return len(self.source.x)


@dataclass(frozen=True)
class Problem:
    """What a rung is fitted on; ``label`` names it on progress bars and in errors.

    Attributes:
      joint: for rungs that go through one, the way from A to B through a joint code of the models:
        W_enc [d_a, width], b_enc, threshold, W_dec [width, d_b], b_dec, in raw units.
    """

    label: str
    train: Pairs
    validation: Pairs
    joint: dict[str, jax.Array] | None = None


class Map(nnx.Module):
    """Predicts B's features from A's side: ``map(inputs) -> f_B`` [batch, width_b], f_B >= 0.

    A rung is one file of this package: a subclass with a ``kind`` of the file's name, and
    ``fit(problems, config, *, seed, directory) -> list[Fitted]`` in the order of ``problems``.
    Its constructor takes B's dictionary and what ``arguments`` returns (JSON values that fix
    every shape). B's dictionary is a part of the map; a checkpoint holds the rest and points
    to it.

    Attributes:
      kind: the rung's name.
      reads: what ``inputs`` are: "features" [batch, width_a], "activations" [batch, d_a] or
        "tokens" int [batch], all of A.
      predicts_activation: whether ``activation(inputs)`` gives x_B [batch, d_b] as well.
      fits_together: whether ``fit`` must get all problems of a run at once.
      through_joint: whether its problems must hold a joint code.
    """

    kind: ClassVar[str]
    reads: ClassVar[str]
    predicts_activation: ClassVar[bool] = False
    fits_together: ClassVar[bool] = False
    through_joint: ClassVar[bool] = False

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments beside the dictionary, as JSON values."""
        return {}

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        """Returns B's features [batch, width_b].

        Args:
          inputs: what ``reads`` says.
          tokens: A's tokens [batch], for rungs that read them besides; without them every row
            takes the back-off.
        """
        raise NotImplementedError


class ActivationMap(Map):
    """A map that predicts x_B from x_A and encodes it with B's dictionary."""

    reads = "activations"
    predicts_activation = True

    def activation(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        """Returns B's activations [batch, d_b] of A's [batch, d_a]."""
        raise NotImplementedError

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return self.dictionary.encode(self.activation(inputs, tokens=tokens))


class AffineMap(ActivationMap):
    """``x_B = (x_A - mean_a) W + mean_b``."""

    def __init__(self, dictionary: Dictionary, *, d_a: int):
        super().__init__(dictionary)
        self.mean_a = nnx.Param(jnp.zeros(d_a))
        self.W = nnx.Param(jnp.zeros((d_a, dictionary.d_model)))
        self.mean_b = nnx.Param(jnp.zeros(dictionary.d_model))

    @property
    def arguments(self) -> dict[str, Any]:
        return {"d_a": self.W.shape[0]}

    def activation(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        x = inputs.astype(jnp.float32) - self.mean_a[...][None, :]
        return exact_matmul(x, self.W[...]) + self.mean_b[...][None, :]


class TokenTable(nnx.Module):
    """One row per token seen in training; every other token takes the last row, the back-off.

    ``ids`` are the seen tokens in ascending order: the table grows with the text, not with the
    vocabulary.
    """

    def __init__(self, seen: int, size: int):
        self.ids = nnx.Variable(jnp.zeros(seen, jnp.int32))
        self.rows = nnx.Param(jnp.zeros((seen + 1, size)))

    def __call__(self, tokens: jax.Array | None, batch: int) -> jax.Array:
        """Returns rows [batch, size] of tokens [batch]; without tokens, the back-off."""
        rows = self.rows[...]
        if tokens is None:
            return jnp.broadcast_to(rows[-1:], (batch, rows.shape[1]))
        return rows[find_tokens(self.ids[...], tokens)]


def find_tokens(ids: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the place of each token in the ascending ``ids``, or ``len(ids)`` if it is absent."""
    place = jnp.searchsorted(ids, tokens)
    found = jnp.asarray(ids)[jnp.minimum(place, len(ids) - 1)] == tokens
    return jnp.where(found, place, len(ids))


def exact_matmul(x: jax.Array, W: jax.Array) -> jax.Array:
    """Returns ``x W`` in float32 on any device (some multiply in fewer bits by default)."""
    return jnp.matmul(x, W, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Fitted:
    """A fitted map and its record: chosen hyper-parameters, validation scores (JSON values)."""

    map: Map
    record: dict[str, Any] = field(default_factory=dict)


def build(
    cls: type[Map], dictionary: Dictionary, arguments: dict[str, Any], values: modules.Params
) -> Map:
    """Returns the map of class ``cls`` whose own parameters are ``values``, all of them.

    Args:
      arguments: of its constructor, beside B's dictionary.
      values: nested names -> arrays, of the shapes that the constructor gives.
    """
    graphdef, own = _abstract(cls, dictionary, arguments)

    def checked(abstract, value):
        if abstract.shape != value.shape:
            raise ValueError(f"{cls.kind}: shape {value.shape} in place of {abstract.shape}")
        return jnp.asarray(value, abstract.dtype)

    values = jax.tree.map(checked, own, values)
    return modules.merge(graphdef, values | {"dictionary": modules.split(dictionary)[1]})


def _abstract(cls: type[Map], dictionary: Dictionary, arguments: dict[str, Any]):
    graphdef, params = modules.abstract(lambda: cls(dictionary, **arguments))
    return graphdef, own_parameters(params)


def own_parameters(params: modules.Params) -> modules.Params:
    """Returns a map's parameters without those of B's dictionary."""
    return {name: value for name, value in params.items() if name != "dictionary"}


def map_module(kind: str) -> ModuleType:
    """Returns the module of a rung; UserError listing the allowed names if there is none."""
    if kind not in map_kinds():
        raise UserError(f"map.kinds={kind} is no map; use {', '.join(map_kinds())}.")
    return importlib.import_module(f"{__package__}.kinds.{kind}")


def map_class(kind: str) -> type[Map]:
    """Returns the Map subclass of a rung."""
    found = vars(map_module(kind)).values()
    return next(c for c in found if isinstance(c, type) and getattr(c, "kind", None) == kind)


def fingerprint(dictionary: Dictionary) -> str:
    """Returns a checksum of a dictionary's parameters, their names and their shapes."""
    _, params = modules.split(dictionary)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(m: Map, path: Path, *, dictionary: Path, record: dict[str, Any] | None = None) -> None:
    """Writes a map's own parameters; B's dictionary is remembered by place and checksum.

    Args:
      path: a new folder.
      dictionary: the folder of B's dictionary; a relative path to it is stored.
      record: how the map was fitted (JSON values).
    """
    _, params = modules.split(m)
    meta = {
        "kind": m.kind,
        "reads": m.reads,
        "arguments": m.arguments,
        "target_dictionary": os.path.relpath(Path(dictionary).absolute(), Path(path).absolute()),
        "target_fingerprint": fingerprint(m.dictionary),
        "record": record or {},
    }
    save_module(Path(path), own_parameters(params), meta)


def load(path: Path | str, dictionary: Dictionary | None = None) -> Map:
    """Returns the map in a checkpoint folder, with B's dictionary.

    Args:
      dictionary: B's, where it is loaded already; it must be the one in the checkpoint's folder.

    Raises:
      UserError: there is no finished map, it is damaged, or B's dictionary is missing, damaged
        or another one than the map was fitted with.
    """
    meta = load_meta(Path(path))
    dictionary = _target_dictionary(Path(path), meta, dictionary)
    cls, arguments = map_class(meta["kind"]), meta["arguments"]
    _, abstract = _abstract(cls, dictionary, arguments)
    return build(cls, dictionary, arguments, load_params(Path(path), abstract))


def _target_dictionary(
    path: Path, meta: dict[str, Any], dictionary: Dictionary | None
) -> Dictionary:
    place = Path(os.path.normpath(path / meta["target_dictionary"]))
    if not place.is_dir():
        raise UserError(
            f"Map {path} needs the target's dictionary {place}, which is missing; "
            "restore it or train dictionaries and maps again."
        )
    dictionary = dictionaries.load(place) if dictionary is None else dictionary
    if fingerprint(dictionary) != meta["target_fingerprint"]:
        raise UserError(
            f"Map {path} was fitted with another dictionary than {place} holds; "
            "restore that one or delete the map and fit it again."
        )
    return dictionary


def check_rows(problem: Problem, kind: str, *, train: int = 2, validation: int = 1) -> None:
    """Raises UserError if a problem has fewer rows than the rung needs, or one is not finite."""
    for split, least in (("train", train), ("validation", validation)):
        rows = len(getattr(problem, split))
        if rows < least:
            raise UserError(
                f"{problem.label} has {rows} paired {split} rows and {kind} needs {least} or "
                "more; raise text.documents."
            )
    for split in ("train", "validation"):
        pairs = getattr(problem, split)
        for name, side in (("source", pairs.source), ("target", pairs.target)):
            if side.bad_row is not None:
                raise UserError(
                    f"{problem.label}: row {side.bad_row} of the {name}'s {split} rows (document "
                    f"{pairs.documents[side.bad_row]}) holds NaN or infinity; extract activations "
                    "again or look at the model."
                )


def check_grid(name: str, values: Sequence[float], *, positive: bool) -> None:
    """Raises UserError unless a grid of hyper-parameters has values, all finite and in range."""
    bad = [v for v in values if not np.isfinite(v) or v < 0 or (positive and v == 0)]
    if bad or not values:
        value, allowed = bad[0] if bad else "()", "above 0" if positive else "0 or above"
        raise UserError(f"{name}={value} cannot be tried; give numbers {allowed}.")


def slices(n: int, size: int = ROWS) -> Iterator[slice]:
    """Yields consecutive slices that cover ``n`` rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns ``rows`` lengthened to ``size`` with its last row: one compiled shape for all."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def encode_rows(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """Returns features float32 [m, width] of at most ROWS activations [m, d_model]."""
    graphdef, params = modules.split(dictionary)
    return np.asarray(_encode(graphdef, params, padded(x, ROWS)))[: len(x)]


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, x) -> jax.Array:
    return modules.merge(graphdef, params).encode(x.astype(jnp.float32))
