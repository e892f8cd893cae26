"""What is known of a model's features without any paired row: directions, statistics, tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Pairs, Side, encode_rows, slices
from crossdict_jax.maps.moments import moments, token_sums

RARE = 0.01  # of the mean variance, added to each: keeps a rare feature from drowning the others
SPREAD = 0.3  # weight of all of A's covariance against that of its token means
DAMPING = 0.1  # ridge penalty of the token profiles, in multiples of the mean of the diagonal
TURNS = 3  # of the subspace iteration that cuts a matrix down to a rank

Weights = tuple[np.ndarray, np.ndarray]  # U [width_a, rank], V [width_b, rank]: W = U V'


@dataclass(frozen=True)
class Profile:
    """How one dictionary's features respond to what the model has just read.

    Attributes:
      names: what each token stands for, the same in every model: its bytes.
      counts: [tokens], rows that end in it.
      means: [tokens, width], mean features of these rows, less the mean of all rows.
      covariance: [width, width], of the features over all rows.
    """

    names: tuple[Hashable, ...]
    counts: np.ndarray
    means: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Description:
    """One dictionary as a hypernetwork sees it, in the role of source or of target.

    Everything is of this model alone: of its dictionary, and of what its features do on training
    rows. Means, rates and scales are of all training rows; the profile is of every second training
    document, and of the other ones where the role is the other: no text is in both profiles.

    Attributes:
      side: the rows in their own order.
      rows: the numbers of those that the profile is taken from.
    """

    side: Side
    rows: np.ndarray

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean features, float64 [width]."""
        return self.side.feature_moments[0]

    @cached_property
    def variance(self) -> np.ndarray:
        """Variance of the features, float64 [width]."""
        return self.side.feature_moments[1]

    @cached_property
    def scale(self) -> np.ndarray:
        """Standard deviation of the features, damped where it is small, [width]."""
        damped = np.sqrt(self.variance + RARE * self.variance.mean())
        return np.where(damped > 0, damped, 1.0)

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
        enc, dec = _unit(enc), _unit(dec)
        facts = [
            np.log10(self.rate + 1e-5) + 2,
            self.mean / self.scale,
            np.log(self.scale / self.scale.mean()),
            np.sum(enc * dec, axis=1),
        ]
        size = np.sqrt(dec.shape[1])
        found = {
            "moves": moves / (np.sqrt(np.mean(moves**2)) or 1.0),
            "reads": size * enc,
            "writes": size * dec,
            "facts": np.stack(facts, axis=1),
        }
        return {name: value.astype(np.float32) for name, value in found.items()}

    @cached_property
    def rate(self) -> np.ndarray:
        """The share of training rows in which each feature is active, [width]."""
        everything = np.arange(len(self.side.x))
        return sum((f > 0).sum(0) for f in _features(self.side, everything)) / len(everything)

    @cached_property
    def profile(self) -> Profile:
        """The features by the bytes of the model's own token, on this role's documents."""
        side, rows, width = self.side, self.rows, self.side.dictionary.width
        tokens = side.tokens[rows]
        sums = token_sums(
            tokens, lambda part: encode_rows(side.dictionary, side.x[rows[part]]), size=width
        )
        both = moments((f, f[:, :1]) for f in _features(side, rows))
        spelled = side.token_bytes() if side.token_bytes else None
        names = [int(i) if spelled is None else spelled[i] for i in sums.ids]
        unique, place = _distinct(names)  # several ids may stand for the same bytes
        counts, totals = np.zeros(len(unique)), np.zeros((len(unique), width))
        np.add.at(counts, place, sums.counts)
        np.add.at(totals, place, sums.sums)
        means = totals / counts[:, None] - sums.mean[None, :]
        return Profile(unique, counts, means, both.aa / both.n)


def _distinct(names: list[Hashable]) -> tuple[tuple[Hashable, ...], np.ndarray]:
    places: dict[Hashable, int] = {}
    place = np.array([places.setdefault(name, len(places)) for name in names])
    return tuple(places), place


def _features(side: Side, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields features [m, width] of the numbered rows, a batch at a time."""
    for part in slices(len(rows)):
        yield encode_rows(side.dictionary, side.x[rows[part]])


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


class Describer:
    """Describes sides; those that several problems share are described once."""

    def __init__(self):
        self._known: dict[tuple[int, str], Description] = {}

    def both(self, pairs: Pairs, label: str) -> tuple[Description, Description]:
        """Returns (source, target); shuffling pairs changes neither.

        Raises:
          UserError: the rows are of one document only.
        """
        documents, place = np.unique(pairs.documents, return_inverse=True)
        if len(documents) < 2:
            raise UserError(
                f"{label} has {len(documents)} training documents and hypernetwork needs 2 or "
                "more, one to describe each side by; raise text.documents."
            )
        odd = place % 2 == 1
        return (
            self._describe(pairs.source, "source", np.flatnonzero(~odd)),
            self._describe(pairs.target, "target", np.flatnonzero(odd)),
        )

    def _describe(self, side: Side, role: str, rows: np.ndarray) -> Description:
        side = side.reordered_from or side
        # The description holds the side, so its id stays its own.
        return self._known.setdefault((id(side), role), Description(side, rows))


def profile_weights(
    source: Description, target: Description, *, rank: int, known: np.ndarray
) -> Weights:
    """Returns weights that token profiles alone call for, of ``rank`` at most, for raw features.

    Tokens that both models know are taken for rows: A's mean features of a token, X, should give
    B's, Y, both times the root of how often the token was read (the harmonic mean of both counts).
    W = (X'X + s n C_A + penalty)^-1 X'Y is ridge regression that also shrinks what A's features do
    within a token, of which the profiles say nothing of B's. No row of A meets one of B.

    Args:
      known: bool [width_a]; the others are taken for silent and get rows of zeros.
    """
    X, Y, n = _shared_tokens(source.profile, target.profile)
    X = X[:, known]
    K = (1 - SPREAD) * X.T @ X + SPREAD * n * source.profile.covariance[np.ix_(known, known)]
    penalty = DAMPING * np.trace(K) / max(len(K), 1) or 1.0  # nothing varies: any will do
    W = np.zeros((len(known), Y.shape[1]))
    W[known] = np.linalg.solve(K + penalty * np.eye(len(K)), X.T @ Y)
    return cut(W, rank)


def _shared_tokens(a: Profile, b: Profile) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns both models' means of the tokens that both have read, weighed, and the weights' sum.

    [tokens, width_a], [tokens, width_b].
    """
    place_b = {name: i for i, name in enumerate(b.names)}
    pairs = [(i, place_b[name]) for i, name in enumerate(a.names) if name in place_b]
    i, j = np.array(pairs, np.int64).reshape(-1, 2).T
    weight = 2 / (1 / a.counts[i] + 1 / b.counts[j])
    root = np.sqrt(weight)[:, None]
    return a.means[i] * root, b.means[j] * root, float(weight.sum())


def cut(W: np.ndarray, rank: int) -> Weights:
    """Returns U, V whose product U V' is W, or nearly its best approximation of that rank.

    Subspace iteration from a fixed start: a wide W is never decomposed as a whole.
    """
    size = min(rank, *W.shape)
    V = np.random.Generator(np.random.Philox(key=0)).standard_normal((W.shape[1], size))
    for _ in range(TURNS):
        V = np.linalg.qr(W.T @ (W @ V))[0]
    U = np.zeros((len(W), rank))
    U[:, :size] = W @ V
    return U, np.pad(V, ((0, 0), (0, rank - size)))
