"""What a model's features are without any paired row: directions, statistics, tokens."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Pairs, Side, slices
from crossdict_jax.maps.moments import moments, token_sums
from crossdict_jax.maps.network import damped_scale

SPREAD = 0.3  # weight of A's covariance against that of its token means
DAMPING = 0.1  # ridge penalty of the token profiles, in multiples of the mean of the diagonal
PROFILE_RANK = 128  # of the token profiles' weights
TURNS = 3  # of the subspace iteration for a low rank


@dataclass(frozen=True)
class Profile:
    """How one dictionary's features respond to the token that was just read."""

    names: tuple[Hashable, ...]  # the bytes of each token, the same in every model
    counts: np.ndarray  # [tokens], rows that end in it
    means: np.ndarray  # [tokens, width], mean features of these rows, less the mean of all rows
    covariance: np.ndarray  # [width, width], over all rows


@dataclass(frozen=True)
class Description:
    """One dictionary as a hypernetwork sees it, as source or as target, from its model alone.

    Moments are of all training rows, the profile of every second document: the two roles of a
    dictionary share no text.
    """

    role: str  # source or target
    side: Side  # in their own order
    rows: np.ndarray  # row numbers of the profile

    @property
    def tower(self) -> str:
        """The part of a network that reads it."""
        return f"{self.role} {self.side.model}"

    @cached_property
    def scale(self) -> np.ndarray:
        """Standard deviation of the features, damped where small, [width]."""
        return damped_scale(self.side.feature_moments.variance)

    @cached_property
    def directions(self) -> dict[str, np.ndarray]:
        """What the towers read, float32, in numbers of a typical size of 1.

        ``moves`` [width, d_model]: decoder row times scale; ``reads`` and ``writes``: unit encoder
        and decoder rows; ``facts`` [width, 4]: log10 firing rate, mean and log of scale, cosine of
        encoder and decoder row.
        """
        d, of_rows, scale = self.side.dictionary, self.side.feature_moments, self.scale
        enc, dec = (np.asarray(W[...], np.float64) for W in (d.W_enc, d.W_dec))
        enc, moves, size = enc.T, scale[:, None] * dec, np.sqrt(dec.shape[1])
        lengths = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (enc, dec))
        enc, dec = (r / np.where(n > 0, n, 1.0) for r, n in zip((enc, dec), lengths))
        facts = [
            np.log10(of_rows.firings / of_rows.n + 1e-5) + 2,
            of_rows.mean / scale,
            np.log(scale / scale.mean()),
            np.sum(enc * dec, axis=1),
        ]
        arrays = {
            "moves": moves / (np.sqrt(np.mean(moves**2)) or 1.0),
            "reads": size * enc,
            "writes": size * dec,
            "facts": np.stack(facts, axis=1),
        }
        return {name: value.astype(np.float32) for name, value in arrays.items()}

    @cached_property
    def profile(self) -> Profile:
        """The features by the bytes of the model's own token, on this role's documents."""
        side, some = self.side, self.rows
        ids, at = np.unique(side.tokens[some], return_inverse=True)
        names = map(side.token_bytes().__getitem__, ids) if side.token_bytes else ids.tolist()
        index: dict[Hashable, int] = {}  # several ids may have the same bytes
        label = np.array([index.setdefault(name, len(index)) for name in names])[at]
        sums = token_sums(label, side.codes[some])
        batches = (side.features(some[part]) for part in slices(len(some)))
        products, _ = moments((f, f[:, :1]) for f in batches)
        rows = sums.shrunk(0.0)  # the last is the overall mean
        return Profile(tuple(index), sums.counts, rows[:-1] - rows[-1:], products.aa / products.n)


def describe(pairs: Pairs, label: str) -> tuple[Description, Description]:
    """Returns (source, target), made once for all problems; shuffling pairs changes neither.

    Raises:
      UserError: the rows are of one document only.
    """
    documents, index = np.unique(pairs.documents, return_inverse=True)
    if len(documents) < 2:
        raise UserError(
            f"{label} has {len(documents)} training documents and hypernetwork needs 2 or "
            "more, one to describe each side by; raise text.documents."
        )
    both = []
    for parity, (role, side) in enumerate((("source", pairs.source), ("target", pairs.target))):
        description = Description(role, side.straight, np.flatnonzero(index % 2 == parity))
        both.append(side.straight.described.setdefault(role, description))
    return tuple(both)


def profile_weights(
    source: Description, target: Description, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of token profiles for raw features, W = U V'.

    U is [width_a, PROFILE_RANK], V [width_b, PROFILE_RANK].

    Rows are tokens that both models know: A's mean features X should give B's, Y, both times the
    root of the token's count (the harmonic mean of both models').
    W = (X'X + s n C_A + penalty)^-1 X'Y is ridge regression that also shrinks what A's features do
    within a token, where profiles say nothing of B. No row of A meets one of B.

    Args:
      mask: bool [width_a], features used (default: all); others get rows of zeros.
    """
    a, b = source.profile, target.profile
    mask = np.ones(len(a.covariance), bool) if mask is None else mask
    index_b = {name: j for j, name in enumerate(b.names)}
    shared = [(i, index_b[name]) for i, name in enumerate(a.names) if name in index_b]
    i, j = np.array(shared, np.int64).reshape(-1, 2).T
    weights = 2 / (1 / a.counts[i] + 1 / b.counts[j])
    root = np.sqrt(weights)[:, None]
    X, Y = a.means[i][:, mask] * root, b.means[j] * root  # [tokens, width_a], [tokens, width_b]
    within = weights.sum() * a.covariance[np.ix_(mask, mask)]
    K = (1 - SPREAD) * X.T @ X + SPREAD * within
    penalty = DAMPING * np.trace(K) / max(len(K), 1) or 1.0  # 1 if nothing varies
    W = np.zeros((len(mask), Y.shape[1]))
    W[mask] = np.linalg.solve(K + penalty * np.eye(len(K)), X.T @ Y)
    # Subspace iteration from a fixed start: a nearly best low rank without decomposing a wide W.
    size = min(PROFILE_RANK, *W.shape)
    V = stats.generator(0).standard_normal((W.shape[1], size))
    for _ in range(TURNS):
        V = np.linalg.qr(W.T @ (W @ V))[0]
    missing = (0, 0), (0, PROFILE_RANK - size)
    return np.pad(W @ V, missing), np.pad(V, missing)
