"""Linear probes: multinomial logistic regression, its penalty chosen by cross-validation."""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special

from crossdict_jax import stats

FOLDS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # for rows of mean square norm 1: from hardly any to strong


@dataclass(frozen=True)
class Probe:
    """``argmax(x W + b)``: W [d, classes], b [classes], and the chosen penalty."""

    W: np.ndarray
    b: np.ndarray
    penalty: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.argmax(x @ self.W + self.b[None, :], axis=1)


def train(x: np.ndarray, labels: np.ndarray, *, classes: int, seed: int) -> list[Probe]:
    """Returns a probe for each row of labels, int [variants, n], of rows x [n, d].

    Minimises mean cross-entropy + penalty / 2 ||W||^2 on rows scaled to a mean square norm of 1.
    The penalty, of PENALTIES, has the least held-out cross-entropy over FOLDS folds.
    """
    n, x = len(x), x.astype(np.float64)
    scale = 1 / max(np.sqrt(np.square(x).sum(1).mean()), 1e-30)
    # The solution lies in the span of the rows: n columns say as much as d do.
    U, s, V = np.linalg.svd(x * scale, full_matrices=False)
    z = np.concatenate([U * s, np.ones((n, 1))], axis=1)  # [n, r + 1]
    fold = stats.generator(seed).permutation(n) % FOLDS
    nothing, probes = np.zeros((z.shape[1], classes)), []
    for y in labels:
        held_out = dict.fromkeys(PENALTIES, 0.0)
        for i in range(FOLDS):
            W, rest = nothing, fold != i
            for penalty in sorted(PENALTIES, reverse=True):  # warm starts
                W = _fit(z[rest], y[rest], penalty, W)
                log_p = scipy.special.log_softmax(z[~rest] @ W, axis=1)
                held_out[penalty] -= np.take_along_axis(log_p, y[~rest, None], axis=1).sum()
        best = min(PENALTIES, key=held_out.get)
        W = _fit(z, y, best, nothing)
        probes.append(Probe(scale * (V.T @ W[:-1]), W[-1], best))
    return probes


def _fit(z: np.ndarray, y: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    """W [r + 1, classes] of least loss; its last row, the constant, is not penalised."""
    penalties, rows = np.full((z.shape[1], 1), penalty), np.arange(len(y))
    penalties[-1] = 0

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        W = w.reshape(start.shape)
        log_p = scipy.special.log_softmax(z @ W, axis=1)
        error = np.exp(log_p)
        error[rows, y] -= 1
        gradient = z.T @ error / len(z) + penalties * W
        return 0.5 * np.sum(penalties * W * W) - log_p[rows, y].mean(), gradient.ravel()

    # L-BFGS-B's many tiny LAPACK calls cost ten times the work in threads on a shared machine.
    solution = scipy.optimize.minimize(
        objective, start.ravel(), jac=True, method="CG", options={"gtol": 1e-5, "maxiter": 500}
    )
    return solution.x.reshape(start.shape)
