"""What a model's features are without any paired row: directions, statistics, tokens."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax import stats
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Pairs, Side, slices
from crossdict_jax.maps.codes import Moments
from crossdict_jax.maps.moments import moments, token_sums
from crossdict_jax.maps.network import damped_scale

SPREAD = 0.3  # weight of all of A's covariance against that of its token means
DAMPING = 0.1  # ridge penalty of the token profiles, in multiples of the mean of the diagonal
PROFILE_RANK = 128  # of the weights that token profiles call for
TURNS = 3  # of the subspace iteration that cuts a matrix down to a rank

Weights = tuple[np.ndarray, np.ndarray]  # U [width_a, rank], V [width_b, rank]: W = U V'


@dataclass(frozen=True)
class Profile:
    """How one dictionary's features respond to what the model has just read."""

    names: tuple[Hashable, ...]  # what each token stands for, the same in every model: its bytes
    counts: np.ndarray  # [tokens], rows that end in it
    means: np.ndarray  # [tokens, width], mean features of these rows, less the mean of all rows
    covariance: np.ndarray  # [width, width], of the features over all rows


@dataclass(frozen=True)
class Description:
    """One dictionary as a hypernetwork sees it, in the role of source or of target.

    Everything is of this model alone. Means, rates and scales are of all training rows; the
    profile is of every second document, of the others in the other role: it shares no text.
    """

    side: Side  # the rows in their own order
    rows: np.ndarray  # the numbers of those that the profile is taken from

    @property
    def moments(self) -> Moments:
        """Mean and variance of the features, on all rows."""
        return self.side.feature_moments

    @cached_property
    def scale(self) -> np.ndarray:
        """Standard deviation of the features, damped where it is small, [width]."""
        return damped_scale(self.moments.variance)

    @cached_property
    def directions(self) -> dict[str, np.ndarray]:
        """What the towers read, float32: of every feature, in numbers of a typical size of 1.

        ``moves`` [width, d_model]: by what the feature moves the activation, decoder row times
        scale; ``reads`` and ``writes``: encoder and decoder row, unit directions; ``facts``
        [width, 4]: log10 firing rate, mean and log of scale, cosine of encoder and decoder row.
        """
        enc = np.asarray(self.side.dictionary.W_enc[...], np.float64).T
        dec = np.asarray(self.side.dictionary.W_dec[...], np.float64)
        moves = self.scale[:, None] * dec
        lengths = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (enc, dec))
        enc, dec = (r / np.where(n > 0, n, 1.0) for r, n in zip((enc, dec), lengths))
        facts = [
            np.log10(self.moments.firings / self.moments.n + 1e-5) + 2,
            self.moments.mean / self.scale,
            np.log(self.scale / self.scale.mean()),
            np.sum(enc * dec, axis=1),
        ]
        size = np.sqrt(dec.shape[1])
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
        side, rows = self.side, self.rows
        ids, at = np.unique(side.tokens[rows], return_inverse=True)
        names = (
            ids.tolist() if side.token_bytes is None else map(side.token_bytes().__getitem__, ids)
        )
        index: dict[Hashable, int] = {}  # several ids may stand for the same bytes
        label = np.array([index.setdefault(name, len(index)) for name in names])[at]
        sums = token_sums(label, side.codes[rows])
        batches = (side.features(rows[part]) for part in slices(len(rows)))
        products, _ = moments((f, f[:, :1]) for f in batches)
        means = sums.sums / sums.counts[:, None] - sums.mean[None, :]
        return Profile(tuple(index), sums.counts, means, products.aa / products.n)


def describe(pairs: Pairs, label: str) -> tuple[Description, Description]:
    """Returns (source, target), described once for all problems; shuffling pairs changes neither.

    Raises:
      UserError: the rows are of one document only.
    """
    documents, index = np.unique(pairs.documents, return_inverse=True)
    if len(documents) < 2:
        raise UserError(
            f"{label} has {len(documents)} training documents and hypernetwork needs 2 or "
            "more, one to describe each side by; raise text.documents."
        )
    for parity, (role, side) in enumerate((("source", pairs.source), ("target", pairs.target))):
        description = Description(side.reordered_from or side, np.flatnonzero(index % 2 == parity))
        side.described.setdefault(role, description)
    return pairs.source.described["source"], pairs.target.described["target"]


def profile_weights(
    source: Description, target: Description, mask: np.ndarray | None = None, *, rank=PROFILE_RANK
) -> Weights:
    """Returns weights that token profiles alone call for, of ``rank`` at most, for raw features.

    Tokens that both models know are taken for rows: A's mean features of a token, X, should give
    B's, Y, both times the root of how often the token was read (the harmonic mean of both counts).
    W = (X'X + s n C_A + penalty)^-1 X'Y is ridge regression that also shrinks what A's features do
    within a token, of which the profiles say nothing of B's. No row of A meets one of B.

    Args:
      mask: bool [width_a]; other features are taken for silent and get rows of zeros; None: all.
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
    penalty = DAMPING * np.trace(K) / max(len(K), 1) or 1.0  # nothing varies: any will do
    W = np.zeros((len(mask), Y.shape[1]))
    W[mask] = np.linalg.solve(K + penalty * np.eye(len(K)), X.T @ Y)
    # Nearly the best approximation of that rank, by subspace iteration from a fixed start: a wide W
    # is never decomposed as a whole.
    size = min(rank, *W.shape)
    V = stats.generator(0).standard_normal((W.shape[1], size))
    for _ in range(TURNS):
        V = np.linalg.qr(W.T @ (W @ V))[0]
    U = np.zeros((len(W), rank))
    U[:, :size] = W @ V
    return U, np.pad(V, ((0, 0), (0, rank - size)))
