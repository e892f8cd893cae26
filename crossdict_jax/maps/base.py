"""What every map shares: paired rows, the protocol, predictions, checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import sparse

from crossdict_jax import dictionaries, modules
from crossdict_jax.config import MapConfig, map_kinds
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import TooFewRows, UserError
from crossdict_jax.maps.codes import Codes, Moments, compress, sparse_pays
from crossdict_jax.maps.moments import (
    ROWS,
    Regression,
    TokenSums,
    find_tokens,
    moments,
    slices,
    token_sums,
)
from crossdict_jax.modules import padded
from crossdict_jax.ops import exact
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import understood

SPARSE_COST = 1000  # of float64 by scipy, in float32 multiply-adds of XLA's on two CPU cores


@dataclass(frozen=True, eq=False)
class Side:
    """One model's half of paired rows."""

    x: np.ndarray  # [n, d_model], bfloat16 or float32, on the host
    tokens: np.ndarray  # int32 [n], the model's own token that ends at the position
    dictionary: Dictionary
    model: str = ""
    layer: int = 0
    # The bytes of each token id; None where all sides share a vocabulary.
    token_bytes: Callable[[], Sequence[bytes]] | None = None
    reordered_from: Side | None = None
    order: np.ndarray | None = None  # int [n], each row's index in ``reordered_from``
    keys: np.ndarray | None = None  # int [n, 2], (document, byte end)
    described: dict[str, Any] = field(default_factory=dict, init=False)  # by role

    @property
    def straight(self) -> Side:
        """The same rows before any reordering, which measures once what no order changes."""
        return self.reordered_from or self

    def activations(self, rows: np.ndarray | slice) -> np.ndarray:
        """Returns float32 [m, d_model]."""
        return self.x[rows].astype(np.float32)

    @cached_property
    def codes(self) -> Codes:
        """The features [n, width] of all rows, encoded once."""
        if self.order is not None:
            return self.straight.codes[self.order]
        blocks = (encode_rows(self.dictionary, self.x[rows]) for rows in slices(len(self.x)))
        width = self.dictionary.width
        return sparse.vstack([Codes((0, width), dtype=np.float32), *map(compress, blocks)], "csr")

    def features(self, rows: np.ndarray | slice) -> np.ndarray:
        """Returns float32 [m, width]."""
        return self.codes[rows].toarray()

    @cached_property
    def feature_moments(self) -> Moments:
        """Mean and variance of the features over all rows."""
        return Moments.of(self.codes) if self.order is None else self.straight.feature_moments

    @cached_property
    def bad_row(self) -> int | None:
        """The first row with NaN or infinity; None if there is none."""
        for rows in slices(len(self.x)):
            bad = ~np.isfinite(self.activations(rows)).all(axis=1)
            if bad.any():
                return rows.start + int(bad.argmax())
        return None

    def take(self, rows: np.ndarray | slice) -> Side:
        """Returns these rows alone."""
        keys = None if self.keys is None else self.keys[rows]
        some = {"x": self.x[rows], "tokens": self.tokens[rows], "keys": keys}
        taken = dataclasses.replace(self, **some, reordered_from=None, order=None)
        if "codes" in vars(self):  # encoded already
            vars(taken)["codes"] = self.codes[rows]
        return taken

    def reordered(self, order: np.ndarray) -> Side:
        """Returns the rows in another order."""
        rows = {"x": self.x[order], "tokens": self.tokens[order]}
        return dataclasses.replace(self, **rows, reordered_from=self, order=order, keys=None)


@dataclass(frozen=True)
class Pairs:
    """Rows of A (source) and B (target); row i is one text position of both, unless shuffled."""

    source: Side
    target: Side
    documents: np.ndarray  # int32 [n], the document of the source row

    def __post_init__(self):
        a, b = self.source, self.target
        if len({len(a.x), len(a.tokens), len(b.x), len(b.tokens), len(self.documents)}) > 1:
            raise UserError(
                f"Pairs need equally many rows: the source has {len(a.x)} and {len(a.tokens)} "
                f"tokens, the target {len(b.x)} and {len(b.tokens)}, with {len(self.documents)} "
                "documents; take both sides from the same rows."
            )
        if a.keys is None or b.keys is None or np.array_equal(a.keys, b.keys):
            return
        row = int(np.argmax((a.keys != b.keys).any(axis=1)))
        ends = [f"document {d}, byte {end}" for d, end in (a.keys[row], b.keys[row])]
        raise UserError(
            f"Row {row} is {ends[0]} in the source and {ends[1]} in the target; take both sides "
            "from one store."
        )

    def __len__(self) -> int:
        return len(self.source.x)

    def take(self, rows: np.ndarray | slice) -> Pairs:
        """Returns these rows alone."""
        return Pairs(self.source.take(rows), self.target.take(rows), self.documents[rows])

    @cached_property
    def target_by_token(self) -> TokenSums:
        """Sums of the target's features by the source's token."""
        return token_sums(self.source.tokens, self.target.codes)


@dataclass(frozen=True)
class Problem:
    """What a map is fitted on."""

    label: str  # on progress bars and in errors
    train: Pairs
    validation: Pairs
    # From A to B through a joint code, in raw units: W_enc [d_a, width], b_enc, threshold,
    # W_dec [width, d_b], b_dec.
    joint: dict[str, jax.Array] | None = None

    @cached_property
    def dictionaries(self) -> list[str]:
        """Checksums of both sides', by which a training knows its data."""
        sides = self.train.source, self.train.target
        return [modules.fingerprint(side.dictionary) for side in sides]

    def regress(self, read: Callable[[Side, slice], np.ndarray]) -> Regression:
        """Returns the regression of B on A; ``read`` is Side.activations or Side.features."""

        def rows(pairs: Pairs):
            if read is Side.features:
                codes = pairs.source.codes, pairs.target.codes
                if all(sparse_pays(codes[0], side, SPARSE_COST) for side in codes):
                    return codes
            return ((read(pairs.source, i), read(pairs.target, i)) for i in slices(len(pairs)))

        products, means = moments(rows(self.train))
        return Regression(means, products, moments(rows(self.validation), means)[0])

    @cached_property
    def regression(self) -> Regression:
        """The regression of activations, once for all maps."""
        return self.regress(Side.activations)


def encode_rows(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """Returns features float32 [m, width] of activations [m, d_model]."""
    return modules.over_rows(dictionary, x, method="encode", size=ROWS)


def check_rows(problem: Problem, kind: str, fewest: int = 2) -> None:
    """Raises UserError: TooFewRows, fewer than the map needs, or one that is not finite."""
    for split, minimum in (("train", fewest), ("validation", 1)):
        pairs = getattr(problem, split)
        if len(pairs) < minimum:
            raise TooFewRows(
                f"{problem.label} has {len(pairs)} paired {split} rows and {kind} needs {minimum} "
                "or more; raise text.documents."
            )
        for name in ("source", "target"):
            if (row := getattr(pairs, name).straight.bad_row) is not None:
                raise UserError(
                    f"{problem.label}: row {row} of the {name}'s {split} rows (document "
                    f"{pairs.documents[row]}) holds NaN or infinity; extract activations again or "
                    "look at the model."
                )


class Map(modules.Plain):
    """Predicts B's features from A's side: ``map(inputs) -> f_B`` [batch, width_b], f_B >= 0.

    A kind is a file of ``maps/kinds``: a subclass with that ``kind``, and ``solve`` or ``fit``.
    B's dictionary is part of the map, but checkpoints only point to it.

    Attributes:
      reads: what ``inputs`` are: "features" [batch, width_a], "activations" [batch, d_a] or
        "tokens" int [batch], all of A.
      predicts_activation: whether ``activation(inputs)`` gives x_B [batch, d_b].
      fits_together: whether ``fit`` gets all problems of a run at once.
      through_joint: whether its problems must hold a joint code.
      settings: names of the attributes, JSON values, that are not arrays.
      chosen: names of the hyper-parameters that a closed form chooses.
      fewest_rows: training rows that it needs.
    """

    kind: ClassVar[str]
    reads: ClassVar[str]
    predicts_activation: ClassVar[bool] = False
    fits_together: ClassVar[bool] = False
    through_joint: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()
    chosen: ClassVar[tuple[str, ...]] = ()
    fewest_rows: ClassVar[int] = 2

    def __init__(self, dictionary: Dictionary, values: modules.Params | None = None, **settings):
        """``dictionary`` is B's; ``values``, nested {name: array}, become parameters."""
        self.dictionary = dictionary
        for name, value in (values or {}).items():
            setattr(self, name, _parameters(value))
        for name in self.settings:
            setattr(self, name, settings[name])

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        """Returns B's features [batch, width_b].

        Args:
          tokens: A's [batch], for maps that read them too; without them rows take the back-off.
        """
        raise NotImplementedError

    @classmethod
    def solve(
        cls, problem: Problem, config: MapConfig
    ) -> tuple[dict[tuple, float], Callable[..., modules.Params]]:
        """Returns ({values of ``chosen``: validation MSE}, these values -> the map's arrays)."""
        raise NotImplementedError

    @classmethod
    def fit(cls, problems: Sequence[Problem], config: MapConfig, **training) -> list[Fitted]:
        """Returns the map of each problem, its hyper-parameters chosen by validation error.

        Args:
          training: of trained kinds: ``seed``, ``directory`` (checkpoints and metrics),
            ``checkpoint_every`` and ``records``.

        Raises:
          UserError: too few rows, or rows that are not finite.
        """
        fitted = []
        for problem in problems:
            check_rows(problem, cls.kind, cls.fewest_rows)
            errors, arrays = cls.solve(problem, config)
            best = min(errors, key=errors.get)
            grid = [dict(zip(cls.chosen, v)) | {"mse": mse} for v, mse in errors.items()]
            record = dict(zip(cls.chosen, best)) | {"validation_mse": grid}
            fitted.append(Fitted(cls(problem.train.target.dictionary, arrays(*best)), record))
        return fitted


def _parameters(value: Any) -> nnx.Dict | nnx.Param:
    if isinstance(value, dict):
        return nnx.Dict({name: _parameters(inner) for name, inner in value.items()})
    if isinstance(value, np.ndarray):
        value = value.copy()  # on the CPU an array may share its bytes
    return nnx.Param(jax.device_put(value))


class Fitted(NamedTuple):
    """A fitted map and its record: chosen hyper-parameters, validation scores (JSON values)."""

    map: Map
    record: dict[str, Any]


class ActivationMap(Map):
    """Predicts x_B: ``activation(inputs, tokens=None)`` [batch, d_b]; B's dictionary encodes it."""

    reads = "activations"
    predicts_activation = True

    def __call__(self, inputs, *, tokens=None):
        return self.dictionary.encode(self.activation(inputs, tokens=tokens))


class AffineMap(ActivationMap):
    """``x_B = (x_A - mean_a) W + mean_b``."""

    def activation(self, inputs, *, tokens=None):
        x = modules.rows(inputs, len(self.mean_a[...])) - self.mean_a[...][None, :]
        return exact(x, self.W[...]) + self.mean_b[...][None, :]


def look_up(table: nnx.Dict, tokens: jax.Array | None, batch: int) -> jax.Array:
    """Returns the rows [batch, size] of a token table for tokens [batch].

    A table is {"ids": int32 [seen], ascending; "rows": [seen + 1, size]}. Its last row, the
    back-off, is for other tokens and for rows without tokens.
    """
    rows = table.rows[...]
    if tokens is None:
        return jnp.broadcast_to(rows[-1:], (batch, rows.shape[1]))
    tokens = jnp.asarray(tokens)
    if tokens.shape != (batch,) or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens must be {batch} whole numbers, one for each row.")
    return rows[find_tokens(table.ids[...], tokens.astype(jnp.int32))]


def map_class(kind: str) -> type[Map]:
    """Returns the Map subclass of a kind; UserError listing the allowed names if there is none."""
    if kind not in map_kinds():
        raise UserError(f"map.kinds={kind} is no map; use {', '.join(map_kinds())}.")
    members = vars(importlib.import_module(f"{__package__}.kinds.{kind}")).values()
    return next(c for c in members if isinstance(c, type) and getattr(c, "kind", None) == kind)


def predictions(
    m: Map, pairs: Pairs, batch_size: int = ROWS, *, method: str = "__call__"
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, B's predicted features float32 [m, width_b]), or what another method gives."""
    (graph, params), source, encoder = modules.split(m), pairs.source, None
    if m.predicts_activation and method == "__call__":  # these kinds share B's encoder
        encoder, method = modules.split(m.dictionary), "activation"
    read = {"tokens": source.tokens.__getitem__, "activations": source.x.__getitem__}

    def dispatch(rows: slice) -> tuple[slice, jax.Array]:
        inputs = read.get(m.reads, source.features)(rows)
        batch = [padded(a, batch_size) for a in (inputs, source.tokens[rows])]
        out = predict_batch(graph, method, params, *batch)
        return rows, modules.call(encoder[0], "encode", encoder[1], out) if encoder else out

    for rows, out in modules.ahead(map(dispatch, slices(len(pairs), batch_size))):
        yield rows, np.asarray(out)[: rows.stop - rows.start]


def predict(m: Map, pairs: Pairs, batch_size: int = ROWS, *, method: str = "__call__"):
    """Returns B's predicted features float32 [n, width_b]; see ``predictions``."""
    return np.concatenate([out for _, out in predictions(m, pairs, batch_size, method=method)])


@partial(jax.jit, static_argnums=(0, 1))
def predict_batch(graph, method, params, inputs, tokens):
    """Returns a method's result of one batch."""
    return getattr(modules.merge(graph, params), method)(inputs, tokens=tokens)


def predict_activations(m: ActivationMap, pairs: Pairs, batch_size: int = ROWS) -> np.ndarray:
    """Returns B's predicted activations float32 [n, d_b]."""
    return predict(m, pairs, batch_size, method="activation")


def save(
    m: Map,
    path: Path,
    *,
    dictionary: Path,
    source: Dictionary | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Writes a map's own parameters, the folder of B's dictionary, and checksums.

    Args:
      path: a new folder.
      dictionary: folder of B's dictionary; stored relative to ``path``.
      source: A's dictionary, if the map was fitted on what it gives.
      record: how the map was fitted (JSON values).
    """
    path, dictionary = map(os.path.expanduser, (path, dictionary))
    params = {name: a for name, a in modules.split(m)[1].items() if name != "dictionary"}
    meta = {
        "kind": m.kind,
        "reads": m.reads,
        "settings": {name: getattr(m, name) for name in m.settings},
        "shapes": jax.tree.map(lambda a: f"{a.dtype} {' '.join(map(str, a.shape))}", params),
        "target_dictionary": os.path.relpath(dictionary, path),
        "target_fingerprint": modules.fingerprint(m.dictionary),
        "source_fingerprint": source and modules.fingerprint(source),
        "record": record or {},
    }
    checkpoint.save(Path(path), params=params, meta=meta)


@modules.plain
def load(
    path: Path | str, dictionary: Dictionary | None = None, source: Dictionary | None = None
) -> Map:
    """Returns the map in a checkpoint folder, with B's dictionary.

    Args:
      dictionary: B's, if loaded; it must be the one that the checkpoint points to.
      source: A's, to be checked.

    Raises:
      UserError: there is no finished map, it is damaged, or B's dictionary is missing, damaged
        or not the one that the map was fitted with, or A's is not.
    """
    path = Path(os.path.expanduser(path))
    meta = checkpoint.load_meta(path)
    if "target_dictionary" not in meta:
        raise UserError(f"{path} holds another checkpoint than a map's; correct the path.")
    with understood(path):
        pointed = [base / meta["target_dictionary"] for base in (path, path.resolve())]  # of links
        folder, real = (Path(os.path.normpath(p)) for p in pointed)
        if not folder.is_dir() and not (folder := real).is_dir():
            raise UserError(
                f"Map {path} needs the target's dictionary {folder}, which is missing; restore it "
                "or train dictionaries and maps again."
            )
        dictionary = dictionaries.load(folder) if dictionary is None else dictionary
        for end, now in (("source", source), ("target", dictionary)):
            fitted = meta.get(f"{end}_fingerprint")
            if now and fitted not in (None, modules.fingerprint(now)):
                raise UserError(
                    f"Map {path} was fitted with another dictionary of the {end} than lies there "
                    "now; restore that one, or delete the map and fit it again."
                )
        abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(tuple(map(int, s.split()[1:])), s.split()[0]),
            meta["shapes"],
        )
        values = checkpoint.load_params(path, abstract)
        return map_class(meta["kind"])(dictionary, values, **meta["settings"])
